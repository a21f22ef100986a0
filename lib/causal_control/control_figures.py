"""Figures of causal control: dose and response, control against collateral, matched ratios."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.causal_control.doses import METHODS, OWN_ANSWER
from lib.reading.figures import TWIN, WIDTH, nothing_to_show, style_of, use_theme

# Each method wears the colour of the quantity that it acts on.
ACTS_ON = {
    "rotation": "angle",
    "additive": "distance",
    "unembedding": "logit lens",
    "random plane": "random plane",
    "radial": "norm",
    OWN_ANSWER: "own answer",
}
LABELS = {
    "rotation": "rotation to target",
    "additive": "additive steering",
    "unembedding": "unembedding edit",
    "random plane": "random plane",
    "radial": "radial edit",
    OWN_ANSWER: "rotation to own answer (answer lost)",
}
RIVAL_LABELS = {"additive": "over additive steering", "unembedding": "over unembedding edit"}


def dose_figure(
    table: pd.DataFrame, *, panel: str, ylabel: str = "flip rate", columns: int = 3
) -> Figure:
    """Returns dose–response curves, a panel for each value of a column; the twin's grey, dashed.

    Args:
        table: from `control_tables.dose_curves`, one readout.
        panel: column that holds the panel's title.
        ylabel: what is measured.
        columns: panels side by side.
    """
    if table.empty:
        return nothing_to_show()
    use_theme()
    panels = list(dict.fromkeys(table[panel]))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(WIDTH, 2.2 * rows + 1.0), sharex=True, sharey=True, squeeze=False
    )
    for axes, name in zip(grid.flat, panels, strict=False):
        for (method, untrained), curve in table[table[panel] == name].groupby(
            ["method", "untrained"], sort=False
        ):
            _draw(axes, curve.sort_values("degrees"), str(method), bool(untrained))
        axes.set_title(name, fontsize="small")
        axes.set_ylim(-0.04, 1.04)
        axes.set_xticks(range(0, 61, 20))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel, fontsize="small")
    for column in range(columns):
        axes = grid.flat[len(panels) - 1 - column]
        axes.set_xlabel("dose φ (degrees)", fontsize="small")
        axes.tick_params(labelbottom=True)
    _legend(figure, grid)
    return figure


def pareto_figure(table: pd.DataFrame) -> Figure:
    """Returns control against collateral: the flip rate on x, the KL of the rest on y, by dose.

    Args:
        table: from `dose_curves`, readouts `flipped` and `rest_kl_nats`, the mean over tasks, of
            the trained model and its twin.
    """
    chosen = table[(table["degrees"] > 0) & (table["method"] != OWN_ANSWER)]
    if chosen.empty:
        return nothing_to_show()
    use_theme()
    twins = sorted(chosen["untrained"].unique())
    figure, grid = plt.subplots(
        1, len(twins), figsize=(WIDTH, 4.2), sharex=True, sharey=True, squeeze=False
    )
    for axes, untrained in zip(grid.flat, twins, strict=True):
        for method in METHODS:
            one = chosen[(chosen["untrained"] == untrained) & (chosen["method"] == method)]
            flips, rest = (
                one[one["readout"] == readout].set_index("degrees").sort_index()
                for readout in ("flipped", "rest_kl_nats")
            )
            if flips.empty:
                continue
            style = style_of(ACTS_ON[method], untrained=bool(untrained))
            axes.errorbar(
                flips["estimate"],
                rest["estimate"],
                xerr=_arms(flips),
                yerr=_arms(rest),
                elinewidth=0.7,
                label=_label(method, bool(untrained)),
                **style,
            )
        axes.set_yscale("log")
        axes.set_xlim(-0.04, 1.06)
        axes.axvline(0.5, color="#444444", linestyle=":", linewidth=1.2)
        axes.set_title("untrained twin" if untrained else "trained", fontsize="small")
        axes.set_xlabel("flip rate", fontsize="small")
    grid[0, 0].set_ylabel("KL of the rest (nats, log scale)", fontsize="small")
    _legend(figure, grid)
    return figure


def ratio_figure(table: pd.DataFrame) -> Figure:
    """Returns the rotation's collateral over each rival's at the matched flip rate, by task.

    Args:
        table: from `control_tables.matched_table`, one readout; trained and untrained.
    """
    if table.empty:
        return nothing_to_show()
    use_theme()
    tasks = list(dict.fromkeys(table["task"]))[::-1]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.5 * len(tasks) + 1.7))
    offsets = {"additive": 0.14, "unembedding": -0.14}
    for (rival, untrained), rows in table.groupby(["rival", "untrained"], sort=False):
        label = RIVAL_LABELS[str(rival)] + (", untrained" if untrained else "")
        style = style_of(ACTS_ON[str(rival)], untrained=bool(untrained)) | {"linestyle": "none"}
        offset = offsets[str(rival)] * (2 if untrained else 1)
        places = [tasks.index(task) + offset for task in rows["task"]]
        axes.errorbar(rows["estimate"], places, xerr=_arms(rows), label=label, **style)
    axes.axvline(1.0, color="#444444", linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(tasks)), tasks)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if _inside(tick, table)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("rotation's collateral over its rival's (log scale); left of 1: more selective")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def loss_figure(table: pd.DataFrame) -> Figure:
    """Returns how much each method raises the loss on unrelated continuations.

    Args:
        table: from `continuations.loss_table`.
    """
    if table.empty:
        return nothing_to_show()
    use_theme()
    figure, axes = plt.subplots(figsize=(WIDTH, 0.4 * len(table) + 1.2))
    for place, row in enumerate(table.iloc[::-1].to_dict("records")):
        style = style_of(ACTS_ON[row["method"]]) | {"linestyle": "none"}
        bounds = [[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]]
        axes.errorbar([row["estimate"]], [place], xerr=bounds, **style)
    axes.set_yticks(range(len(table)), [LABELS[method] for method in table["method"].iloc[::-1]])
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.axvline(0.0, color="#444444", linestyle=":", linewidth=1.2)
    axes.set_xlabel("rise of the loss on the continuation (nats a token)")
    return figure


def _draw(axes: Axes, curve: pd.DataFrame, method: str, untrained: bool) -> None:
    style = style_of(ACTS_ON[method], untrained=untrained)
    x = curve["degrees"]
    axes.plot(x, curve["estimate"], label=_label(method, untrained), **style)
    axes.fill_between(x, curve["low"], curve["high"], color=style["color"], alpha=0.15, linewidth=0)


def _label(method: str, untrained: bool) -> str:
    return f"{LABELS[method]}, untrained" if untrained else LABELS[method]


def _arms(rows: pd.DataFrame) -> np.ndarray:
    """Return the lengths of error bars `[2, n]`."""
    lower, upper = rows["estimate"] - rows["low"], rows["high"] - rows["estimate"]
    arms: np.ndarray = np.stack([lower, upper]).clip(min=0)
    return arms


def _inside(tick: float, table: pd.DataFrame) -> bool:
    return bool(min(table["low"].min(), 1) * 0.7 <= tick <= max(table["high"].max(), 1) * 1.4)


def _legend(figure: Figure, grid: Any) -> None:
    """Puts one legend below all panels, trained entries only where a twin's has its fellow."""
    entries: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    shown = [n for n in entries if n.removesuffix(", untrained") not in entries or "," not in n]
    handles = [entries[name] for name in shown]
    if any(name.endswith(", untrained") for name in entries):
        handles.append(Line2D([], [], color=TWIN, linestyle="--"))
        shown.append("untrained twin (same markers)")
    figure.legend(handles, shown, loc="outside lower center", ncols=3)
