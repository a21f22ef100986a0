"""Figures of the inside of the switch: heads on the depth axis, parts, groups, knock-outs."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.evidence.criteria import POOLED
from lib.reading.figures import (
    STYLES,
    THRESHOLD,
    TWIN,
    WIDTH,
    book_rows,
    draw_curve,
    mark_last_block,
    name_rows,
    nothing_to_show,
    of_table,
    style_of,
    use_theme,
)

COLOURS = "cividis"


def heads_under_curves(
    curves: pd.DataFrame, heads: Mapping[str, np.ndarray], *, n_blocks: int
) -> Figure:
    """Return the chapter's picture: both arms over depth, and below them every head of the model.

    Args:
        curves: columns `arm`, `block`, `estimate`, `low`, `high`: the hand-over.
        heads: by task, T of each head exchanged alone `[n_heads, n_blocks]`.
        n_blocks: depth of the model.
    """
    use_theme()
    if not heads:
        return nothing_to_show()
    n_heads = [len(table) for table in heads.values()]
    ratios = [10.0, *n_heads]
    figure, grid = plt.subplots(
        len(ratios),
        1,
        figsize=(WIDTH, 2.1 + 0.16 * sum(n_heads) + 0.25 * len(n_heads)),
        sharex=True,
        height_ratios=ratios,
        squeeze=False,
    )
    top, *below = grid[:, 0]
    for arm, curve in curves.groupby("arm", sort=False):
        draw_curve(top, curve, str(arm))
    mark_last_block(top, n_blocks)
    top.set_ylim(-0.15, 1.08)
    top.set_ylabel("T", rotation=0)
    top.set_title("the whole state, exchanged after a block", fontsize="small")
    top.legend(loc="center left")
    for axes, (name, table) in zip(below, heads.items(), strict=True):
        mesh = axes.pcolormesh(
            np.arange(n_blocks + 1) - 0.5,
            np.arange(len(table) + 1) - 0.5,
            table.clip(0, 1),
            vmin=0,
            vmax=1,
            cmap=COLOURS,
            edgecolors="#ffffff22",
            linewidth=0.3,
        )
        best = np.unravel_index(int(table[:, :-1].argmax()), table[:, :-1].shape)
        axes.annotate(
            f"{table[best]:.2f}",
            (best[1], best[0]),
            xytext=(-14, 0),
            textcoords="offset points",
            color="white",
            ha="right",
            va="center",
            fontsize="small",
            arrowprops={"arrowstyle": "-", "color": "white"},
        )
        axes.set_yticks([0, len(table) - 1])
        axes.set_ylabel("head", fontsize="small")
        axes.set_title(f"one head's output alone: {name}", fontsize="small")
    below[-1].set_xlabel("block")
    figure.colorbar(mesh, ax=list(below), label="T", fraction=0.04, pad=0.01)
    return figure


@of_table
def number_of_heads(table: pd.DataFrame, threshold: float) -> Figure:
    """Return T against the number of heads that are exchanged together.

    Args:
        table: columns `kind` ("best" or "random"), `n_heads`, `task`, `estimate`, `low`, `high`;
            "all tasks" thick.
        threshold: what three heads have to reach.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2))
    best = table[table["kind"] == "best"]
    for name, one in best[best["task"] != POOLED].groupby("task"):
        axes.plot(one["n_heads"], one["estimate"], color=STYLES["head"]["color"], alpha=0.3, lw=0.9)
        end = one.iloc[0]
        if end["estimate"] < 0.3:
            axes.annotate(str(name), (end["n_heads"], end["estimate"]), fontsize="x-small")
    mean = best[best["task"] == POOLED]
    curve = mean.assign(block=mean["n_heads"])
    draw_curve(axes, curve, "head", label="best heads, mean over tasks")
    for kind, label in (
        ("random", "others of the same blocks"),
        ("elsewhere", "of the seen tasks"),
    ):
        own = table[table["kind"] == kind]
        dots = own[own["task"] != POOLED]
        style = style_of(f"{kind} heads") | {"linestyle": "none"}
        axes.plot(dots["n_heads"], dots["estimate"], alpha=0.35, **style)
        whole = own[own["task"] == POOLED]
        axes.vlines(whole["n_heads"], whole["low"], whole["high"], color=style["color"])
        axes.plot(whole["n_heads"], whole["estimate"], label=label, **style | {"markersize": 9})
    axes.axhline(threshold, **THRESHOLD)
    axes.set_xticks(sorted(best["n_heads"].unique()))
    axes.set_xlabel("heads exchanged together")
    axes.set_ylabel("transfer T")
    axes.set_ylim(-0.15, 1.08)
    axes.legend(loc="lower right")
    return figure


@of_table
def heads_by_task(table: pd.DataFrame) -> Figure:
    """Return T of single heads on every task, as a matrix.

    Args:
        table: columns `task`, `head` (a label) and `estimate`; missing cells stay white.
    """
    wide = table.pivot(index="task", columns="head", values="estimate")
    wide = wide[wide.max().sort_values(ascending=False).index]
    order = np.lexsort((-wide.max(axis=1), wide.fillna(-1).to_numpy().argmax(axis=1)))
    wide = wide.iloc[order]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.27 * len(wide) + 1.3))
    mesh = axes.pcolormesh(wide.to_numpy().clip(0, 1), vmin=0, vmax=1, cmap=COLOURS)
    for row, column in np.argwhere(wide.to_numpy() >= 0.1):
        value = wide.iloc[row, column]
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize="x-small",
            color="black" if value > 0.6 else "white",
        )
    axes.set_xticks(np.arange(wide.shape[1]) + 0.5, wide.columns, rotation=45, ha="right")
    axes.set_yticks(np.arange(len(wide)) + 0.5, wide.index, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("block.head")
    figure.colorbar(mesh, label="T, the head alone", fraction=0.04, pad=0.01)
    return figure


@of_table
def knock_outs(table: pd.DataFrame, kinds: Sequence[str]) -> Figure:
    """Return what is lost where heads do not see the subject: a row a group, a dot a task.

    Args:
        table: columns `measure`, `group`, `task`, `estimate`; a panel a measure.
        kinds: the groups, in the order of the rows.
    """
    measures = list(dict.fromkeys(table["measure"]))
    figure, grid = plt.subplots(
        1, len(measures), figsize=(WIDTH, 0.42 * len(kinds) + 1.2), sharey=True, squeeze=False
    )
    for axes, measure in zip(grid.flat, measures, strict=True):
        for place, kind in enumerate(kinds):
            own = table[(table["measure"] == measure) & (table["group"] == kind)]
            colour = TWIN if "other" in kind else STYLES["head"]["color"]
            axes.plot(own["estimate"], [place] * len(own), "o", color=colour, alpha=0.35)
            axes.plot([book_rows(own)["estimate"].mean()], [place], "D", color=colour, markersize=8)
        axes.set_xlabel(measure)
    name_rows(grid[0, 0], kinds)
    return figure
