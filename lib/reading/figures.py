"""Figures: the book's theme and the kinds of figure that several chapters share.

Every function takes a tidy table and returns a Figure. A thing keeps its colour, marker and dash
in all chapters; the untrained twin is always grey and dashed; depth is always on x, as the block
number; intervals are always drawn. Nothing rests on colour alone.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.evidence.criteria import MODEL, POOLED, TEXTS
from lib.science.estimate import OWN, Estimate, Measured, pool

_P = ParamSpec("_P")
_COLOURS = sns.color_palette("colorblind").as_hex()
TWIN = "#7f7f7f"
STYLES: Mapping[str, Mapping[str, Any]] = {
    # arms
    "context arm": {"color": _COLOURS[0], "marker": "o"},
    "prediction arm": {"color": _COLOURS[3], "marker": "s"},
    # quantities of a representation
    "angle": {"color": _COLOURS[2], "marker": "D"},
    "distance": {"color": _COLOURS[1], "marker": "^"},
    "norm": {"color": _COLOURS[4], "marker": "v"},
    "logit lens": {"color": _COLOURS[5], "marker": "X"},
    "affine reader": {"color": _COLOURS[0], "marker": "P"},
    "different answers": {"color": "#222222", "marker": "."},
    "angles against prediction": {"color": _COLOURS[2], "marker": "D"},
    # edits and their controls
    "exchange": {"color": "#222222", "marker": "o"},
    "steering on held-out templates": {"color": _COLOURS[1], "marker": "h"},
    "random plane": {"color": _COLOURS[9], "marker": "*"},
    # parts of a block
    "attention": {"color": "#332288", "marker": "o"},
    "mlp": {"color": "#999933", "marker": "s"},
    "head": {"color": "#332288", "marker": "d"},
    "random heads": {"color": TWIN, "marker": "*"},
    "elsewhere heads": {"color": _COLOURS[0], "marker": "P"},
    # sites of an edit
    "subject": {"color": _COLOURS[0], "marker": "o"},
    "subject to second last": {"color": _COLOURS[9], "marker": "<"},
}
"""Colour and marker of everything that appears in more than one figure."""

THRESHOLD: Mapping[str, Any] = {"color": "#b00020", "linestyle": "--", "linewidth": 1}
"""How what a criterion asks for is drawn."""

_POOLED = (POOLED, TEXTS, MODEL)
_FILLS = {"supported": "full", "refuted": "none", "undecided": "left", "shown": "full"}

WIDTH = 7.2
"""Width of a figure in inches: the text column, legible on a phone when scaled down."""


def use_theme() -> None:
    """Set the look of all figures; every figure function of the book calls it."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "axes.labelsize": "medium",
            "font.size": 10,
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
            "legend.frameon": False,
            "legend.fontsize": "small",
            "figure.constrained_layout.use": True,
        },
    )


def of_table(
    draw: Callable[Concatenate[pd.DataFrame, _P], Figure],
) -> Callable[Concatenate[pd.DataFrame, _P], Figure]:
    """Make a function that draws a table set the theme, and say so where the table is empty."""

    @functools.wraps(draw)
    def drawn(table: pd.DataFrame, /, *args: _P.args, **kwargs: _P.kwargs) -> Figure:
        use_theme()
        return draw(table, *args, **kwargs) if len(table) else nothing_to_show()

    return drawn


def style_of(name: str, *, untrained: bool = False) -> dict[str, Any]:
    """Return colour, marker and dash of a named thing; grey and dashed for the untrained twin."""
    chosen = dict(STYLES.get(name, {"color": "#333333", "marker": "o"}))
    if untrained:
        chosen |= {"color": TWIN, "linestyle": "--", "markerfacecolor": "white"}
    return chosen


def draw_curve(
    axes: Axes, curve: pd.DataFrame, name: str, *, untrained: bool = False, label: str | None = None
) -> None:
    """Draw one depth curve with its band.

    Args:
        axes: where to draw.
        curve: columns `block`, `estimate`, `low`, `high`; one row a block.
        name: key of `STYLES`.
        untrained: whether it is the twin's.
        label: name in the legend; `name` by default, with "untrained" for the twin.
    """
    curve = curve.sort_values("block")
    style = style_of(name, untrained=untrained)
    shown = label or (f"{name}, untrained" if untrained else name)
    every = max(1, len(curve) // 10)
    axes.plot(curve["block"], curve["estimate"], label=shown, markevery=every, **style)
    axes.fill_between(
        curve["block"], curve["low"], curve["high"], color=style["color"], alpha=0.18, linewidth=0
    )


def curve_table(
    curves: Mapping[str, Measured], blocks: Sequence[int] | None = None, named: str = "curve"
) -> pd.DataFrame:
    """Return curves or numbers as a tidy table; those that could not be measured are left out.

    Args:
        curves: by name, each `[len(blocks)]`.
        blocks: what the entries are, their places by default.
        named: the column that holds the names.

    Returns:
        Columns `named`, `block`, `estimate`, `low`, `high`, `n`.
    """
    frames = [
        one.to_frame().assign(**{named: name} | ({} if blocks is None else {"block": list(blocks)}))
        for name, one in curves.items()
        if isinstance(one, Estimate)
    ]
    columns = [named, "block", "estimate", "low", "high", "n"]
    if frames:
        return pd.concat(frames, ignore_index=True)[columns]
    # Columns of numbers even where there is none: beside others, objects would spread to them.
    kinds = {**dict.fromkeys(columns, float), named: str, "block": int}
    return pd.DataFrame(columns=columns).astype(kinds)


def task_table(
    measured: Mapping[str, Measured], blocks: Sequence[int] | None = None, *, each: bool = True
) -> pd.DataFrame:
    """Return `curve_table` of numbers by task, column `task`, and of their mean over tasks.

    Without `each` of the mean alone.
    """
    own = measured if each else {}
    return curve_table({**own, POOLED: pool(measured)}, blocks, "task")


def twin_table(twins: Sequence[Mapping[str, Measured]], blocks: Sequence[int]) -> pd.DataFrame:
    """Return untrained twins' curves as `curve_table`: their mean, the lowest and highest seed's.

    Columns `curve`, `untrained`, `block`, `estimate`, `low`, `high`.
    """
    rows = []
    for name in twins[0]:
        seeds = [one[name] for one in twins]
        found = [one.value for one in seeds if isinstance(one, Estimate)]
        if found:
            ends = {"low": np.min(found, axis=0), "high": np.max(found, axis=0)}
            told = {"curve": name, "untrained": True, "block": list(blocks)}
            rows.append(pd.DataFrame({**told, "estimate": np.mean(found, axis=0), **ends}))
    return pd.concat(rows) if rows else curve_table({}).assign(untrained=True)


def mark_transition(axes: Axes, block: float, low: float, high: float) -> None:
    """Mark the transition block with its interval: a dotted line in a light band."""
    axes.axvspan(low, high, color="#bbbbbb", alpha=0.35, linewidth=0)
    axes.axvline(block, color="#444444", linestyle=":", linewidth=1.2)
    axes.annotate(
        "ℓ*",
        (block, 0.55),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        va="center",
        ha="right",
        fontsize="small",
        color="#444444",
    )


def mark_last_block(axes: Axes, n_blocks: int) -> None:
    """Hatch the last block, which is shown and never counted."""
    axes.axvspan(
        n_blocks - 1.5, n_blocks - 0.5, color="#dddddd", alpha=0.5, hatch="//", linewidth=0
    )


def draw_block_axis(axes: Axes, n_blocks: int) -> None:
    """Give a panel the blocks as its x axis, the last one hatched."""
    mark_last_block(axes, n_blocks)
    axes.set_xlim(-0.5, n_blocks - 0.5)
    axes.set_xlabel("block")


def name_rows(axes: Axes, names: Sequence[str], margin: float = 0.5, **text: Any) -> None:
    """Name the rows of a panel, the first one at the top.

    Args:
        axes: where to draw.
        names: one a row.
        margin: room beyond the first and the last row, in rows.
        **text: how the names are written.
    """
    axes.set_yticks(range(len(names)), names, **text)
    axes.set_ylim(len(names) - 1 + margin, -margin)


def small_multiples(
    n_panels: int, columns: int, size: tuple[float, float], *, sharex: bool = True
) -> tuple[Figure, Any]:
    """Return a figure of panels over blocks, and its grid of axes.

    Args:
        n_panels: how many are drawn; the rest of the last row stays white.
        columns: panels side by side.
        size: height of a row of panels, and what the figure is higher than its rows, in inches.
        sharex: whether all panels have the same blocks.
    """
    rows = -(-n_panels // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH, size[0] * rows + size[1]),
        sharex=sharex,
        sharey=True,
        squeeze=False,
    )
    for axes in grid.flat[n_panels:]:
        axes.set_axis_off()
    for column in range(min(columns, n_panels)):
        lowest = grid.flat[n_panels - 1 - column]
        lowest.set_xlabel("block", fontsize="small")
        lowest.tick_params(labelbottom=True)
    return figure, grid


@of_table
def over_depth(
    table: pd.DataFrame, *, ylabel: str, transition: tuple[float, float, float] | None = None
) -> Figure:
    """Return curves over depth, a panel for each group of them: the picture of all chapters.

    Args:
        table: columns `panel`, `n_blocks` (its model's depth), `curve` (a key of `STYLES`),
            `untrained`, `block`, `estimate`, `low`, `high`; and `task`, if single tasks are to be
            drawn, thin, beside those pooled.
        ylabel: what is measured, with its unit.
        transition: ℓ* with the ends of its interval or range, marked in all panels.
    """
    panels = list(dict.fromkeys(table["panel"]))
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    size = (2.7 if len(panels) <= columns else 1.9, 0.7)
    depths = table.groupby("panel")["n_blocks"].first()
    figure, grid = small_multiples(len(panels), columns, size, sharex=depths.nunique() == 1)
    for axes, panel in zip(grid.flat, panels, strict=False):
        own = table[table["panel"] == panel]
        if "task" not in own:
            own = own.assign(task=POOLED)
        pooled = own["task"] == POOLED
        for (name, _), one in own[~pooled].groupby(["curve", "task"]):
            style = {"color": STYLES[name]["color"], "alpha": 0.22, "linewidth": 0.8}
            axes.plot(one["block"], one["estimate"], **style)
        for untrained in (True, False):
            chosen = own[pooled & (own["untrained"] == untrained)]
            for name, one in chosen.groupby("curve", sort=False):
                draw_curve(axes, one, str(name), untrained=untrained)
        if transition:
            mark_transition(axes, *transition)
        mark_last_block(axes, depths[panel])
        axes.axhline(0, color="#444444", linewidth=0.6)
        axes.set_xlim(-0.5, depths[panel] - 0.5)
        axes.set_title(panel, fontsize="small")
        axes.tick_params(labelsize="small")
    grid[0, 0].set_ylim(min(-0.3, table["estimate"].min() - 0.05), 1.08)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel, fontsize="small")
    shared_legend(figure, grid.flat)
    return figure


def book_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the book's tasks (column `task`), without those of a reader's own."""
    return table[~table["task"].astype(str).str.startswith(OWN)]


def draw_numbers(
    axes: Axes,
    table: pd.DataFrame,
    column: str,
    names: Sequence[str],
    shift: float = 0,
    **style: Any,
) -> None:
    """Draw numbers with their intervals, each on the row of its name.

    Args:
        axes: where to draw.
        table: columns `estimate`, `low`, `high`; an interval may leave its number outside.
        column: the one that holds the names.
        names: one a row, as `name_rows`.
        shift: how far off its row each is drawn, in rows.
        **style: colour, marker and label.
    """
    rows = [names.index(name) + shift for name in table[column]]
    axes.hlines(rows, table["low"], table["high"], color=style["color"], linewidth=1.2)
    axes.plot(table["estimate"], rows, **style | {"linestyle": "none"})


@of_table
def beside_twins(table: pd.DataFrame, thresholds: Mapping[str, float]) -> Figure:
    """Return numbers of the trained model and of its twins, a row a name and a panel a threshold.

    Args:
        table: columns `panel`, `name`, `untrained`, `estimate`, `low`, `high`.
        thresholds: by panel, what its criterion asks for.
    """
    names = list(dict.fromkeys(table["name"]))
    size = (WIDTH, 0.22 * len(names) + 1.4)
    figure, grid = plt.subplots(1, len(thresholds), figsize=size, sharey=True, squeeze=False)
    for axes, (panel, threshold) in zip(grid.flat, thresholds.items(), strict=True):
        for untrained, own in table[table["panel"] == panel].groupby("untrained"):
            style = {
                "color": TWIN if untrained else STYLES["angle"]["color"],
                "label": "untrained twins" if untrained else "trained",
                "marker": "D" if untrained else "o",
            }
            draw_numbers(axes, own, "name", names, 0.17 if untrained else -0.17, **style)
        axes.axvline(threshold, **THRESHOLD)
        axes.axvline(0, color="#444444", linewidth=0.6)
        axes.set_title(panel, fontsize="small")
        axes.tick_params(axis="x", labelsize="small")
    name_rows(grid[0, 0], names, 0.6, fontsize="x-small")
    shared_legend(figure, grid.flat)
    return figure


@of_table
def task_panels(
    table: pd.DataFrame,
    *,
    n_blocks: int,
    transitions: Mapping[str, tuple[float, float, float]],
    ylabel: str,
) -> Figure:
    """Return small multiples of depth curves, a panel a task, each with its ℓ* where it has one.

    Args:
        table: a `curve_table` with a column `task`.
        n_blocks: depth of the model.
        transitions: ℓ* and its interval by task.
        ylabel: what is measured.
    """
    tasks = list(dict.fromkeys(table["task"]))
    figure, grid = small_multiples(len(tasks), 4, (1.3, 0.8))
    for axes, task in zip(grid.flat, tasks, strict=False):
        for name, own in table[table["task"] == task].groupby("curve", sort=False):
            draw_curve(axes, own, str(name))
        if task in transitions:
            mark_transition(axes, *transitions[task])
        mark_last_block(axes, n_blocks)
        axes.set_xlim(-0.5, n_blocks - 0.5)
        axes.set_title(task, fontsize="x-small", pad=2)
        axes.tick_params(labelsize="x-small")
    grid[0, 0].set_ylim(-0.3, 1.08)
    figure.supylabel(ylabel, fontsize="small")
    shared_legend(figure, grid.flat)
    return figure


@of_table
def transition_forest(table: pd.DataFrame, *, n_blocks: int, title: str) -> Figure:
    """Return the transition block of each task with its interval, and the width as a bar.

    Args:
        table: columns `task`, `estimate` (the block), `low`, `high`, `width_share` (of the depth);
            one row a task.
        n_blocks: depth of the model.
        title: title above.
    """
    table = table.dropna(subset=["estimate"]).sort_values("estimate", ascending=False)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.36 * len(table) + 1.3))
    tasks = list(table["task"])
    half = table["width_share"].astype(float) * n_blocks / 2
    left = table["estimate"] - half
    axes.barh(range(len(tasks)), 2 * half, left=left, height=0.5, color="#cfcfcf", zorder=1)
    draw_numbers(axes, table, "task", tasks, color="#222222", marker="o")
    middle = book_rows(table)["estimate"].median()
    axes.axvline(middle, color="#444444", linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlim(-0.5, n_blocks - 0.5)
    axes.set_xlabel("block")
    axes.set_title(title)
    return figure


def forest(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the forest of a claim's records: a panel a statistic, a line a place.

    Intervals as recorded, the criterion's threshold dashed, untrained twins grey; a marker is full
    where supported, hollow where refuted, half full where undecided. What could not be tested
    leaves its line empty. Statistics that no single task has stand below, without lines for tasks.
    Of numbers without a criterion those are drawn that tasks have; curves have figures of their
    own.

    Args:
        rows: records of `lib.evidence.criteria.judge` and `lib.evidence.records.shown`.
    """
    use_theme()
    places_of = Counter(row["statistic"] for row in rows if not row["place"].startswith("block "))
    rows = [row for row in rows if row["criterion"] or places_of[row["statistic"]] > 1]
    if not any(row["estimate"] is not None for row in rows):
        return nothing_to_show()
    by_task = {row["statistic"] for row in rows if row["place"] not in _POOLED}
    groups = [
        [row for row in rows if (row["statistic"] in by_task) == of_tasks]
        for of_tasks in (True, False)
    ]
    lines = [
        (names[start : start + 3], places)
        for group in groups
        for names, places in [_panels(group)]
        for start in range(0, len(names), 3)
    ]
    heights = [0.17 * len(places) + 0.75 for _, places in lines]
    columns = max(len(names) for names, _ in lines)
    figure, grid = plt.subplots(
        len(lines),
        columns,
        figsize=(WIDTH, sum(heights) + 0.5),
        sharey="row",
        squeeze=False,
        height_ratios=heights,
    )
    for line, (names, places) in zip(grid, lines, strict=True):
        for axes, name in zip(line, names, strict=False):
            own = [row for row in rows if row["statistic"] == name and row["estimate"] is not None]
            _draw_intervals(axes, own, places)
            axes.set_title(name.replace("_", " "), fontsize="small")
            axes.tick_params(labelsize="x-small")
        for axes in line[len(names) :]:
            axes.set_axis_off()
        name_rows(line[0], places, 0.6)
    verdicts = [one for one in _FILLS if any(row["verdict"] == one for row in rows)]
    handles = [Line2D([], [], label=one, **_marker(one, "#222222")) for one in verdicts]
    if any(row["untrained"] for row in rows):
        handles.append(Line2D([], [], label="untrained twins", **_marker("supported", TWIN)))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _panels(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the statistics of some records, and their places with what is pooled at the end."""
    places = list(dict.fromkeys(row["place"] for row in rows))
    names = list(dict.fromkeys(row["statistic"] for row in rows))
    return names, sorted(places, key=lambda place: place in _POOLED)


def _draw_intervals(axes: Axes, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    for row in rows:
        y = places.index(row["place"]) + (0.2 if row["untrained"] else -0.1)
        colour = TWIN if row["untrained"] else "#222222"
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.2)
        axes.plot([row["estimate"]], [y], **_marker(row["verdict"], colour))
    if rows and (wanted := re.search(r"[-\d.]+$", rows[0]["criterion"])):
        ends = {float(wanted[0])} | ({-float(wanted[0])} if "±" in rows[0]["criterion"] else set())
        for end in ends:
            axes.axvline(end, **THRESHOLD)


def _marker(verdict: str, colour: str) -> dict[str, Any]:
    style = {"color": colour, "marker": "o", "markersize": 5, "linestyle": "none"}
    return style | {"fillstyle": _FILLS[verdict], "markerfacecoloralt": "white"}


def nothing_to_show() -> Figure:
    """Return a figure that says that no task is testable on this model."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2))
    axes.set_axis_off()
    axes.text(0.5, 0.5, "No task is testable on this model.", ha="center", va="center")
    return figure


def shared_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Put one legend below all panels, each name once."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(4, len(entries)),
    )
