"""Figures of the angular code: by depth with the twins, what reads predictions, rivals, tasks."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.reading.figures import (
    THRESHOLD,
    TWIN,
    WIDTH,
    draw_block_axis,
    draw_curve,
    draw_numbers,
    mark_transition,
    name_rows,
    of_table,
    shared_legend,
    style_of,
    use_theme,
)
from lib.science.estimate import Estimate, Measured, Untested

TWINS = "angle, untrained twins"


def by_depth(
    panels: Mapping[str, pd.DataFrame],
    twins: Mapping[str, Sequence[Measured]],
    *,
    n_blocks: int,
    transition: float | Untested,
) -> Figure:
    """Return the main figure: ρ with J over depth, a panel for the texts and one for the tasks.

    Args:
        panels: by title, a `curve_table` of "angle" and "distance".
        twins: by title, the angle's curve of each seed, drawn as a band over seeds.
        n_blocks: depth of the model.
        transition: ℓ*.
    """
    use_theme()
    figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, 3.5), sharey=True, squeeze=False)
    for axes, (title, table) in zip(grid.flat, panels.items(), strict=True):
        _twin_band(axes, twins[title], range(n_blocks))
        for name, own in table.groupby("curve", sort=False):
            draw_curve(axes, own, str(name))
        _frame(axes, n_blocks, transition)
        axes.set_title(title, fontsize="small")
    grid[0, 0].set_ylabel("rank correlation with J")
    grid[0, 0].set_ylim(-0.15, 1.05)
    shared_legend(figure, grid.flat)
    return figure


def _twin_band(axes: Axes, curves: Sequence[Measured], blocks: Sequence[int] | range) -> None:
    found = np.array([one.value for one in curves if isinstance(one, Estimate)])
    if len(found):
        low, high = found.min(axis=0), found.max(axis=0)
        axes.fill_between(list(blocks), low, high, color=TWIN, alpha=0.35, linewidth=0)
        style = style_of("angle", untrained=True) | {"marker": "", "linewidth": 1.0}
        axes.plot(list(blocks), found.mean(axis=0), label=TWINS, **style)


def _frame(axes: Axes, n_blocks: int, transition: float | Untested) -> None:
    if not isinstance(transition, Untested):
        mark_transition(axes, transition, transition, transition)
    draw_block_axis(axes, n_blocks)


def readers(
    read: pd.DataFrame,
    partial: pd.DataFrame,
    twins: Mapping[str, pd.DataFrame],
    *,
    n_blocks: int,
    transition: float | Untested,
) -> Figure:
    """Return what reads the prediction from a block, and what the angle says beyond each reader.

    Args:
        read: a `curve_table` of "angle", "logit lens" and "affine reader".
        partial: a `curve_table` of the angle's partial ρ given "logit lens" and "affine reader".
        twins: the same two of the twins, as "read" and "partial", with `estimate` their mean and
            `low` and `high` the lowest and highest seed.
        n_blocks: depth of the model.
        transition: ℓ*.
    """
    use_theme()
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True, squeeze=False)
    titles = ("ρ with J", "angle: partial ρ given what is read")
    for axes, title, table, other in zip(
        grid.flat, titles, (read, partial), (twins["read"], twins["partial"]), strict=True
    ):
        for name, own in other.groupby("curve", sort=False):
            draw_curve(axes, own, str(name), untrained=True)
        for name, own in table.groupby("curve", sort=False):
            draw_curve(axes, own, str(name))
        _frame(axes, n_blocks, transition)
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set_title(title, fontsize="small")
    grid[0, 0].set_ylabel("(partial) rank correlation with J")
    shared_legend(figure, grid.flat)
    return figure


@of_table
def rivals(table: pd.DataFrame, threshold: float) -> Figure:
    """Return the partial ρ of the angle and of its rivals given the affine reader, a row each.

    Args:
        table: columns `rival`, `estimate`, `low`, `high`, `untrained`.
        threshold: the criterion that the angle has to reach.
    """
    names = list(dict.fromkeys(table["rival"]))
    figure, axes = plt.subplots(figsize=(WIDTH, 0.42 * len(names) + 1.4))
    for untrained, own in table.groupby("untrained"):
        style = style_of("angle", untrained=bool(untrained))
        style["label"] = "untrained twins" if untrained else "trained"
        draw_numbers(axes, own, "rival", names, 0.14 if untrained else -0.14, **style)
    axes.axvline(threshold, **THRESHOLD)
    axes.axvline(0, color="#444444", linewidth=0.8)
    name_rows(axes, names)
    axes.set_xlabel("partial ρ with J given the affine reader, late blocks")
    shared_legend(figure, [axes])
    return figure
