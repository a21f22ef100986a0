"""Figures of causal control: control and its price, parts of a state, nulls, spans, methods."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lib.evidence.criteria import POOLED
from lib.reading.figures import (
    STYLES,
    THRESHOLD,
    TWIN,
    WIDTH,
    book_rows,
    draw_numbers,
    name_rows,
    of_table,
    shared_legend,
)

METHOD_STYLES: Mapping[str, Mapping[str, Any]] = {
    "rotate to centroid": STYLES["angle"],
    "rotate by difference": {**STYLES["angle"], "marker": "d", "linestyle": "-."},
    "add centroid": {**STYLES["steering on held-out templates"], "linestyle": ":"},
    "add difference": STYLES["steering on held-out templates"],
    "rotate to donor": STYLES["exchange"],
    "logit edit": {**STYLES["logit lens"], "linestyle": ":"},
    "rotate in a random plane": {**STYLES["random plane"], "linestyle": "--"},
}
"""How each way to steer is drawn in all figures of the chapter."""


@of_table
def control_and_price(
    flips: pd.DataFrame, shares: pd.DataFrame, nulls: pd.DataFrame, *, wanted: float
) -> Figure:
    """Return the main figure: flips against the dose, and what they cost.

    Args:
        flips: columns `method`, `dose`, `estimate`, `low`, `high`, pooled over tasks.
        shares: columns `method`, `dose`, `estimate`: of the probability moved, the share that goes
            from source to target.
        nulls: columns `null`, `estimate`, `low`, `high`: flips beyond chance the whole way.
        wanted: the share that the criterion asks for.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.5))
    for method, own in flips.groupby("method", sort=False):
        style = METHOD_STYLES[str(method)]
        if method in ("rotate to centroid", "rotate in a random plane"):
            left.plot(own["dose"], own["estimate"], label=method, **style)
            band = {"color": style["color"], "alpha": 0.18, "linewidth": 0}
            left.fill_between(own["dose"], own["low"], own["high"], **band)
        both = own.merge(shares[shares["method"] == method], on="dose", suffixes=("", " share"))
        right.plot(both["estimate"], both["estimate share"], label=method, **style)
    for number, (_, null) in enumerate(nulls.iterrows()):
        x = 1.04 + 0.04 * number
        left.plot([x, x], [null["low"], null["high"]], color=TWIN)
        left.plot([x], [null["estimate"]], marker="sxo"[number % 3], color=TWIN, linestyle="none")
    left.text(1.08, 0.14, "nulls", fontsize="x-small", color=TWIN, ha="center")
    left.set_xlabel("share of the way to the target")
    left.set_ylabel("flip rate")
    left.set_title("control", fontsize="small")
    left.set_xlim(0, 1.16)
    left.set_ylim(-0.05, 1.05)
    right.axhline(wanted, **THRESHOLD)
    right.axvline(0.5, color="#444444", linestyle=":", linewidth=1)
    right.set_xlabel("flip rate")
    right.set_ylabel("share of the moved probability\nthat goes from source to target")
    right.set_title("selectivity", fontsize="small")
    right.set_xlim(-0.03, 1.03)
    right.set_ylim(top=1.0)
    shared_legend(figure, [left, right])
    return figure


@of_table
def flips_by_vector(table: pd.DataFrame, *, most: float, least: float) -> Figure:
    """Return flips to the target by what a state is turned to: a row a task, a colour a vector.

    Args:
        table: columns `vector`, `task`, `estimate`, `low`, `high`.
        most: what nulls may reach.
        least: what the rotation to the target has to reach.
    """
    tasks = list(dict.fromkeys(table["task"]))
    figure, axes = plt.subplots(figsize=(WIDTH, 0.28 * len(tasks) + 1.4))
    looks = [("angle", "D"), ("context arm", "s"), ("distance", "X"), ("random plane", "o")]
    for number, (vector, own) in enumerate(table.groupby("vector", sort=False)):
        name, marker = looks[number % len(looks)]
        style = {"color": STYLES[name]["color"], "marker": marker, "label": str(vector)}
        draw_numbers(axes, own, "task", tasks, 0.18 * number - 0.27, **style)
    for x in (most, least):
        axes.axvline(x, **THRESHOLD)
    axes.set_xlabel("flips to the target; of nulls, beyond chance")
    name_rows(axes, tasks, 0.6, fontsize="x-small")
    shared_legend(figure, [axes])
    return figure


@of_table
def spans(table: pd.DataFrame, *, least: float, most: float) -> Figure:
    """Return transfer by the number of directions exchanged, a line a task, and the complements.

    Args:
        table: columns `task`, `k`, `kind` ("span" or "complement"), `judged`, `estimate`, `low`,
            `high`.
        least: what spans have to reach.
        most: what complements may reach.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    for axes, judged in ((left, True), (right, False)):
        chosen = table[table["judged"] == judged]
        for number, (task, own) in enumerate(chosen.groupby("task", sort=False)):
            inside = own[own["kind"] == "span"]
            outside = own[own["kind"] == "complement"]
            marker = "osD^vPX*hd<>p"[number % 13]
            (line,) = axes.plot(inside["k"], inside["estimate"], marker=marker, label=task)
            colour = line.get_color()
            if judged:
                band = {"color": colour, "alpha": 0.15, "linewidth": 0}
                axes.fill_between(inside["k"], inside["low"], inside["high"], **band)
            hollow = {"marker": marker, "color": colour, "markerfacecolor": "white"}
            axes.plot(outside["k"] + 0.15, outside["estimate"], linestyle="none", **hollow)
        for y in (least, most):
            axes.axhline(y, **THRESHOLD)
        axes.set_xlabel("directions exchanged, k")
        title = "at most nine answers" if judged else "more answers (shown)"
        axes.set_title(title, fontsize="small")
        axes.legend(fontsize="x-small", ncols=2, loc="upper left", bbox_to_anchor=(0, -0.24))
    left.set_ylabel("transfer T")
    left.set_ylim(top=1.05)
    return figure


@of_table
def methods_at_half(table: pd.DataFrame, *, wanted: float) -> Figure:
    """Return each method's selective share at its own dose of flip rate one half.

    Beside a method stands the number of the book's tasks in which it flips half.

    Args:
        table: columns `method`, `task`, `estimate`, `low`, `high`; diamonds are all tasks.
        wanted: what the criterion asks for.
    """
    methods = list(dict.fromkeys(table["method"]))
    tasks = book_rows(table[table["task"] != POOLED])["method"].value_counts()
    figure, axes = plt.subplots(figsize=(WIDTH, 0.42 * len(methods) + 1.0))
    for method, own in table.groupby("method", sort=False):
        y, colour = methods.index(str(method)), METHOD_STYLES[str(method)]["color"]
        each, pooled = (own[(own["task"] == POOLED) == whole] for whole in (False, True))
        axes.plot(each["estimate"], [y] * len(each), "o", color=colour, alpha=0.35)
        axes.plot(pooled[["low", "high"]].to_numpy().T, [[y], [y]], color=colour)
        axes.plot(pooled["estimate"], [y] * len(pooled), "D", color=colour, markersize=8)
    axes.axvline(wanted, **THRESHOLD)
    axes.axvline(0, color="#444444", linewidth=0.8)
    name_rows(axes, [f"{method} ({tasks.get(method, 0)})" for method in methods])
    axes.set_xlabel("share of the moved probability from source to target, at flip rate one half")
    return figure
