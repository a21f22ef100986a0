"""Figures of the small decoders: their language, losses, states, codes by depth and by step."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lib.evidence.circle import CONCENTRATIONS
from lib.reading.figures import (
    STYLES,
    THRESHOLD,
    WIDTH,
    draw_block_axis,
    mark_last_block,
    shared_legend,
    use_theme,
)

FloatArray = NDArray[np.float64]

KINDS: Mapping[str, Mapping[str, Any]] = {
    "rmsnorm": {"color": STYLES["angle"]["color"], "marker": "o"},
    "layernorm": {"color": STYLES["context arm"]["color"], "marker": "s", "linestyle": "--"},
    "no-final-norm": {"color": STYLES["norm"]["color"], "marker": "v", "linestyle": "-."},
    "none": {"color": STYLES["distance"]["color"], "marker": "^", "linestyle": ":"},
}
"""Colour, marker and dash of each kind of network."""

MARKS = "osD^"
"""Markers of the confidences, from the least certain on."""

PARTIALS = {
    "angle_given_distance": ("angle, given distance", STYLES["angle"]),
    "distance_given_angle": ("distance, given angle", STYLES["distance"]),
}


def partials_by_depth(table: pd.DataFrame) -> Figure:
    """Return the main figure: both partial correlations over depth, a panel a kind.

    Args:
        table: columns `kind`, `seed`, `block` and those of `PARTIALS`; a point a network, a line
            their mean.
    """
    use_theme()
    kinds = [kind for kind in KINDS if kind in set(table["kind"])]
    figure, grid = plt.subplots(1, len(kinds), figsize=(WIDTH, 2.9), sharey=True, squeeze=False)
    n_blocks = int(table["block"].max()) + 1
    for axes, kind in zip(grid.flat, kinds, strict=True):
        own = table[table["kind"] == kind]
        for column, (label, style) in PARTIALS.items():
            _points_and_mean(axes, own, "block", column, label=label, **style)
        axes.axhline(0, color="#888888", linewidth=0.8)
        draw_block_axis(axes, n_blocks)
        axes.set_title(kind)
        axes.set_ylim(-1.05, 1.05)
        axes.set_xticks(range(n_blocks))
    grid[0, 0].set_ylabel("partial rank correlation with J")
    shared_legend(figure, grid.flat)
    return figure


def language(truths: Mapping[str, FloatArray], title: str) -> Figure:
    """Return the true answers to one question round the clock, a curve a confidence.

    Args:
        truths: by confidence, the probability of each hour `[n_hours]`.
        title: the question.
    """
    use_theme()
    figure = plt.figure(figsize=(WIDTH * 0.75, 3.4))
    axes: Any = figure.add_subplot(projection="polar")
    for (word, p), colour, mark in zip(
        truths.items(), _four_colours(len(truths)), MARKS, strict=False
    ):
        around = 2 * np.pi * np.arange(len(p) + 1) / len(p)
        axes.plot(around, [*p, p[0]], color=colour, marker=mark, markersize=3, label=word)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    named = np.arange(0, 24, 3)
    axes.set_xticks(2 * np.pi * named / 24, [f"{hour:02d}h" for hour in named])
    axes.set_yticks([0.1, 0.2, 0.3])
    axes.set_rlabel_position(292)
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set_title(title, loc="center", fontsize="medium")
    axes.legend(loc="center left", bbox_to_anchor=(1.15, 0.5))
    return figure


def losses(table: pd.DataFrame, gate: float, guess: float) -> Figure:
    """Return the loss of every network over training.

    Args:
        table: columns `kind`, `seed`, `step`, `kl_nats`.
        gate: what a network has to reach, dashed.
        guess: what one reaches to whom all hours are the same, dotted.
    """
    use_theme()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    for kind, style in KINDS.items():
        for number, (_, one) in enumerate(table[table["kind"] == kind].groupby("seed")):
            axes.plot(
                one["step"],
                one["kl_nats"].rolling(10, min_periods=1).mean(),
                label=kind if number == 0 else None,
                **{**style, "marker": None, "linewidth": 1.0},
            )
    axes.axhline(gate, **THRESHOLD)
    axes.axhline(guess, color="#444444", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("KL(truth ‖ model), nats")
    axes.legend(ncols=2)
    return figure


def maps(
    states: Mapping[str, FloatArray], hours: NDArray[np.int64], confidences: NDArray[np.object_]
) -> Figure:
    """Return the states of networks from above and from the side, a column a network.

    The axis is the direction of the states' mean. From above: the plane across the axis in which
    they spread most. From the side: how far they lie along the axis and, in that plane, from it;
    states of one direction lie on one ray from the origin.

    Args:
        states: by title `[n, d_model]`.
        hours: the true answers' hours `[n]`, shown as colours round the clock.
        confidences: the words of confidence `[n]`, shown by colour and marker.
    """
    use_theme()
    figure, grid = plt.subplots(2, len(states), figsize=(WIDTH, 6.4), squeeze=False)
    words = list(dict.fromkeys(sorted(confidences, key=list(CONCENTRATIONS).index)))
    for (above, side), (title, found) in zip(grid.T, states.items(), strict=True):
        mean = found.mean(axis=0)
        along = found @ (mean / np.linalg.norm(mean))
        across = found - np.outer(along, mean / np.linalg.norm(mean))
        x, y = np.linalg.svd(across, full_matrices=False)[2][:2] @ across.T
        shown = above.scatter(
            x, y, c=hours, s=14, cmap="twilight_shifted", vmin=0, vmax=24,
            edgecolor="#333333", linewidth=0.3,
        )  # fmt: skip
        above.plot(0, 0, marker="+", color="black", markersize=10)
        above.set_aspect("equal", adjustable="datalim")
        above.set_title(title)
        for word, colour, mark in zip(words, _four_colours(len(words)), MARKS, strict=False):
            own = confidences == word
            radius = np.hypot(x, y)[own]
            side.scatter(along[own], radius, color=colour, marker=mark, s=12, label=word)
            slope = float((radius / along[own]).mean())
            reach = min(float(along[own].max()), float(radius.max()) / slope) * 1.05
            side.plot([0, reach], [0, slope * reach], color=colour, linewidth=0.8)
        side.set_xlim(0, None)
        side.set_ylim(0, None)
        side.set_xlabel("along the states' mean")
    grid[0, 0].set_ylabel("across it, from above")
    grid[1, 0].set_ylabel("distance from the axis")
    bar = figure.colorbar(shown, ax=list(grid[0]), location="right", shrink=0.8)
    bar.set_label("hour of the answer", fontsize="small")
    bar.set_ticks(range(0, 25, 6), labels=[f"{hour:02d}h" for hour in range(0, 25, 6)])
    shared_legend(figure, grid[1])
    return figure


def _four_colours(n: int) -> FloatArray:
    return plt.get_cmap("cividis")(np.linspace(0, 0.85, n))


def costs_and_shares(table: pd.DataFrame, bars: Mapping[str, float]) -> Figure:
    """Return what a foreign norm costs, and what the norm tells, over depth.

    Args:
        table: columns `kind`, `seed`, `block`, `norm_cost`, `confidence_share`.
        bars: the criteria's thresholds of the cost, by what they are for, dashed.
    """
    use_theme()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3))
    n_blocks = int(table["block"].max()) + 1
    for axes, column in ((left, "norm_cost"), (right, "confidence_share")):
        for kind, style in KINDS.items():
            own = table[table["kind"] == kind]
            _points_and_mean(axes, own, "block", column, label=kind, **style)
        mark_last_block(axes, n_blocks)
        axes.set_xticks(range(n_blocks))
        axes.set_xlabel("block")
    left.set_yscale("log")
    left.set_ylim(max(1e-5, table["norm_cost"].min() / 2), None)
    for name, level in bars.items():
        left.axhline(level, **THRESHOLD)
        above = level == max(bars.values())
        left.annotate(
            name,
            (n_blocks - 1.6, level),
            (0, 6 if above else -6),
            textcoords="offset points",
            va="bottom" if above else "top",
            ha="right",
            color="#b00020",
            fontsize="x-small",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )
    left.set_title("KL of a norm exchange / of a direction exchange", fontsize="small")
    right.set_ylim(-0.03, 1.05)
    right.set_title("share of the variance of log r between confidences", fontsize="small")
    shared_legend(figure, (left, right))
    return figure


def doses(table: pd.DataFrame, title: str) -> Figure:
    """Return what the edit h → c·h does to the prediction's sharpness.

    Args:
        table: columns `kind`, `seed`, `factor`, `sharpening`.
        title: where the edit is made.
    """
    use_theme()
    figure, axes = plt.subplots(figsize=(WIDTH * 0.8, 3.2))
    ends = np.log2([table["factor"].min(), table["factor"].max()])
    axes.plot(ends, ends, color="#888888", linewidth=1, label="logits times c")
    for kind, style in KINDS.items():
        own = table[table["kind"] == kind].assign(
            dose=lambda t: np.log2(t["factor"]), bits=lambda t: t["sharpening"] / np.log(2)
        )
        _points_and_mean(axes, own, "dose", "bits", label=kind, **style)
    axes.set_xlabel("log₂ c, the factor on the state")
    axes.set_ylabel("−log₂ T, sharper upwards")
    axes.set_title(title)
    axes.legend(fontsize="x-small")
    return figure


def over_training(table: pd.DataFrame) -> Figure:
    """Return loss and partial gap at the moments of training, a line a kind.

    Args:
        table: columns `kind`, `seed`, `step`, `kl_nats`, `partial_gap`, of one network a kind.
    """
    use_theme()
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 3.0), sharex=True)
    titles = {"kl_nats": "KL(truth ‖ model), nats", "partial_gap": "partial gap"}
    for axes, (column, title) in zip(grid, titles.items(), strict=True):
        for kind, style in KINDS.items():
            own = table[table["kind"] == kind].sort_values("step")
            axes.plot(own["step"], own[column], label=kind, **style)
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("training step")
    grid[0].set_yscale("log")
    grid[1].axhline(0, color="#888888", linewidth=0.8)
    shared_legend(figure, grid)
    return figure


def arms_over_training(table: pd.DataFrame) -> Figure:
    """Return transfer over depth at the moments of training, a row an arm, a column a kind.

    Args:
        table: columns `kind`, `step`, `arm`, `block`, `transfer`, of one network a kind.
    """
    use_theme()
    kinds = [kind for kind in KINDS if kind in set(table["kind"])]
    arms = list(dict.fromkeys(table["arm"]))
    figure, grid = plt.subplots(
        len(arms), len(kinds), figsize=(WIDTH, 4.2), sharex=True, sharey=True, squeeze=False
    )
    steps = sorted(table["step"].unique())
    colours = plt.get_cmap("cividis_r")(np.linspace(0.1, 1, len(steps)))
    for row, arm in zip(grid, arms, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            own = table[(table["arm"] == arm) & (table["kind"] == kind)]
            for step, colour in zip(steps, colours, strict=True):
                one = own[own["step"] == step]
                axes.plot(
                    one["block"],
                    one["transfer"],
                    color=colour,
                    label=f"step {step}",
                    marker=STYLES[arm]["marker"],
                    markersize=3,
                    linewidth=2.2 if step == steps[-1] else 1.2,
                )
            axes.set_ylim(-0.3, 1.08)
        row[0].set_ylabel(f"T, {arm}", fontsize="small")
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(kind)
    for axes in grid[-1]:
        axes.set_xlabel("block")
        axes.set_xticks(range(int(table["block"].max()) + 1))
    shared_legend(figure, grid.flat)
    return figure


def _points_and_mean(
    axes: Axes, table: pd.DataFrame, x: str, y: str, *, label: str, **style: Any
) -> None:
    """Draw a point for each network and a line through the means."""
    points = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
    axes.plot(table[x], table[y], **points, markersize=3, alpha=0.5)
    mean = table.groupby(x)[y].mean()
    axes.plot(mean.index, mean, label=label, **style)
