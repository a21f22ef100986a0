"""Figures of the phase transition: where it lies in each model, its content, two widths."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.reading.figures import (
    STYLES,
    THRESHOLD,
    WIDTH,
    book_rows,
    draw_block_axis,
    draw_curve,
    draw_numbers,
    name_rows,
    of_table,
    shared_legend,
    style_of,
)


@of_table
def depths_by_model(table: pd.DataFrame, colours: Mapping[str, str]) -> Figure:
    """Return each task's transition on the relative depth of each model, medians dotted.

    Args:
        table: columns `task`, `model`, `estimate`, `low`, `high`, from 0, the first block, to 1.
        colours: of each model; markers tell them apart as well.
    """
    tasks, models = sorted(set(table["task"])), list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(figsize=(WIDTH, 0.26 * len(tasks) + 1.1))
    for place, (model, marker) in enumerate(zip(models, "osDvP^X", strict=False)):
        one = table[table["model"] == model]
        shift, colour = 0.16 * (place - (len(models) - 1) / 2), colours[model]
        draw_numbers(axes, one, "task", tasks, shift, color=colour, marker=marker, label=model)
        axes.axvline(one["estimate"].median(), color=colour, linestyle=":", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("relative depth of the transition, 0 first block, 1 last")
    name_rows(axes, tasks, 0.7, fontsize="small")
    shared_legend(figure, [axes])
    return figure


LEAST = -1.5
"""Where the axes of what is put in end on the left at the latest: one wrecked prediction would
leave no room for the rest."""


@of_table
def content(table: pd.DataFrame, thresholds: Mapping[str, float]) -> Figure:
    """Return what each kind of donor does where the arms carry: a row a donor, a dot a task.

    What lies left of `LEAST` is drawn there, as an arrowhead.

    Args:
        table: columns `panel`, `donor`, `arm`, `task`, `estimate`; the diamond is their mean.
        thresholds: by panel, what all its rows have to stay below, where it has a criterion.
    """
    panels = list(dict.fromkeys(table["panel"]))
    rows = {panel: list(dict.fromkeys(table[table["panel"] == panel]["donor"])) for panel in panels}
    figure, grid = plt.subplots(
        len(panels),
        1,
        figsize=(WIDTH, 0.5 * sum(map(len, rows.values())) + 1.6),
        height_ratios=[len(rows[panel]) + 0.4 for panel in panels],
        squeeze=False,
    )
    for axes, panel in zip(grid.flat, panels, strict=True):
        for (donor, arm), own in table[table["panel"] == panel].groupby(["donor", "arm"]):
            y = rows[panel].index(str(donor)) + (-0.17 if arm == "context arm" else 0.17)
            style = STYLES[str(arm)]
            dots = {"linestyle": "none", "color": style["color"]}
            each = dots | {"marker": style["marker"], "alpha": 0.4, "label": arm}
            _down_to_least(axes, own["estimate"], y, **each)
            mean = book_rows(own)["estimate"].mean()
            _down_to_least(axes, pd.Series([mean]), y, marker="D", markersize=8, **dots)
        if (table[table["panel"] == panel]["estimate"] < LEAST).any():
            axes.set_xlim(left=LEAST)
        if panel in thresholds:
            axes.axvline(thresholds[panel], **THRESHOLD)
        axes.axvline(0, color="#444444", linewidth=0.8)
        name_rows(axes, rows[panel])
        axes.set_xlabel(panel)
    shared_legend(figure, grid.flat)
    return figure


def _down_to_least(axes: Axes, values: pd.Series, y: float, **style: Any) -> None:
    """Draw values in a row, those below `LEAST` as arrowheads there."""
    inside, beyond = values[values >= LEAST], values[values < LEAST]
    axes.plot(inside, [y] * len(inside), **style)
    if len(beyond):  # an unclipped line of nothing would upset the layout
        arrow = {"marker": "<", "label": None, "clip_on": False}
        axes.plot([LEAST] * len(beyond), [y] * len(beyond), **style | arrow)


@of_table
def two_widths(curves: pd.DataFrame, widths: pd.DataFrame, *, n_blocks: int) -> Figure:
    """Return the geometry's rise beside the prediction arm's: curves, and widths task by task.

    Args:
        curves: columns `quantity` (a key of the book's styles), `block`, `estimate`, `low`, `high`.
        widths: columns `quantity`, `task`, `estimate`, `low`, `high`, in blocks.
        n_blocks: depth of the model.
    """
    tasks = list(dict.fromkeys(widths["task"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, max(3.2, 0.2 * len(tasks) + 1.2)))
    for name, curve in curves.groupby("quantity", sort=False):
        draw_curve(left, curve, str(name))
    draw_block_axis(left, n_blocks)
    left.set_ylabel("T, ρ(θ, J)")
    left.set_title("mean over tasks", fontsize="small")
    for name, own in widths.groupby("quantity", sort=False):
        draw_numbers(right, own, "task", tasks, **style_of(str(name)))
    name_rows(right, tasks, fontsize="x-small")
    right.set_xlim(left=0)
    right.set_xlabel("width of the rise in blocks")
    right.set_title("task by task", fontsize="small")
    shared_legend(figure, [left])
    return figure
