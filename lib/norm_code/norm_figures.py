"""Figures of the norm chapter; theme, colours and markers are those of `lib.reading.figures`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.reading.figures import (
    TWIN,
    WIDTH,
    draw_curve,
    mark_last_block,
    mark_transition,
    nothing_to_show,
    style_of,
    use_theme,
)

Transition = tuple[float, float, float] | None
NAMES = {"norm": "norm exchanged", "direction": "direction exchanged"}
LEAST_KL = 1e-7
"""Lower end of the axis of KL, in nats: below it lies the rounding of float32 logits."""
EDIT_STYLES = {"norm": "norm", "direction": "angle", "scaling": "norm", "rotation": "angle"}
CARRIED: Mapping[str, Mapping[str, Any]] = {
    "template": {"color": "#0173b2", "marker": "o"},
    "subject": {"color": "#029e73", "marker": "D"},
    "kind of text": {"color": "#d55e00", "marker": "s"},
    "position": {"color": "#56b4e9", "marker": "<"},
    "token frequency": {"color": "#cc78bc", "marker": "v"},
    "template, same answer": {"color": "#0173b2", "marker": "o"},
    "subject, same answer": {"color": "#029e73", "marker": "D"},
}


def norm_curves(table: pd.DataFrame) -> Figure:
    """Returns r by block on a logarithmic axis, with the range of 95 % of the contexts.

    Args:
        table: rows of `norms.norm_growth` with `untrained`.
    """
    use_theme()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.1), sharex=True)
    for untrained in (True, False):
        one = table[table["untrained"] == untrained]
        if one.empty:
            continue
        draw_curve(left, one, "norm", untrained=untrained, label=_who("norm r", untrained))
        style = style_of("norm", untrained=untrained)
        for bound in ("range_low", "range_high"):
            label = _who("95 % of contexts", untrained) if bound == "range_low" else None
            right.plot(
                one["block"],
                one[bound],
                color=style["color"],
                linestyle="--" if untrained else "-",
                label=label,
            )
        right.fill_between(
            one["block"], one["range_low"], one["range_high"], color=style["color"], alpha=0.12
        )
    left.set_yscale("log")
    left.set_ylabel("geometric mean of r")
    left.set_title("The norm grows with depth", fontsize="small")
    right.set_yscale("log", base=2)
    right.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
    right.minorticks_off()
    right.set_ylim(min(0.22, table["range_low"].min()), max(4.5, 1.1 * table["range_high"].max()))
    right.set_ylabel("r / its mean")
    right.set_title("Its natural range", fontsize="small")
    for axes in (left, right):
        axes.set_xlabel("block")
    _legend(figure, (left, right))
    return figure


def relation_curves(table: pd.DataFrame, *, margin: float, transition: Transition) -> Figure:
    """Returns rank correlations with J: of angle and norm, and of the norm given the angle.

    Args:
        table: rows of `relations.Relation.to_frame` for one sample, with `untrained`.
        margin: the margin of equivalence, drawn as a band.
        transition: ℓ* with its interval, or None.
    """
    if table.empty:
        return nothing_to_show()
    use_theme()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharex=True)
    names = {"angle": "angle", "norm": "norm", "norm given angle": "norm"}
    for axes, curves in ((left, ("angle", "norm")), (right, ("norm given angle",))):
        for curve in curves:
            for untrained in (True, False):
                one = table[(table["curve"] == curve) & (table["untrained"] == untrained)]
                if len(one):
                    label = _who(curve, untrained)
                    draw_curve(axes, one, names[curve], untrained=untrained, label=label)
        axes.axhline(0, color="#444444", linewidth=0.8)
        _finish_depth(axes, int(table["block"].max()) + 1, transition)
    _draw_margin(right, margin)
    left.set_ylabel("rank correlation with J")
    left.set_title("Angle and norm", fontsize="small")
    right.set_title("Norm given angle", fontsize="small")
    limit = max(0.3, 1.1 * float(table[table["curve"] == "norm given angle"]["high"].abs().max()))
    right.set_ylim(-limit, limit)
    _legend(figure, (left, right))
    return figure


def exchange_curves(table: pd.DataFrame, *, transition: Transition) -> Figure:
    """Returns what exchanging norms and directions does: flip rate, and KL on a logarithmic axis.

    Args:
        table: columns `outcome` (`flip rate` or `KL`), `edit`, `block`, `estimate`, `low`, `high`,
            `untrained`.
        transition: ℓ* with its interval, or None.
    """
    if table.empty:
        return nothing_to_show()
    use_theme()
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharex=True)
    for axes, outcome in zip(grid, ("flip rate", "KL"), strict=True):
        chosen = table[table["outcome"] == outcome]
        for edit, name in NAMES.items():
            for untrained in (True, False):
                one = chosen[(chosen["edit"] == edit) & (chosen["untrained"] == untrained)]
                if outcome == "KL":
                    one = one.assign(
                        **{c: one[c].clip(lower=LEAST_KL) for c in ("estimate", "low")}
                    )
                if len(one):
                    label = _who(name, untrained)
                    draw_curve(axes, one, EDIT_STYLES[edit], untrained=untrained, label=label)
                    _tell_twins_apart(axes, edit, untrained=untrained)
        if outcome == "flip rate":
            axes.set_ylim(-0.04, 1.04)
            axes.set_ylabel("flip rate, mean over tasks")
        else:
            axes.set_yscale("log")
            axes.set_ylim(bottom=LEAST_KL)
            axes.set_ylabel("KL (nats)")
        _finish_depth(axes, int(table["block"].max()) + 1, transition)
    grid[0].set_title("Answer becomes the donor's", fontsize="small")
    grid[1].set_title("Change of the distribution", fontsize="small")
    _legend(figure, grid)
    return figure


OUTCOMES = {
    "argmax_kept": "argmax kept",
    "kl_nats": "KL (nats)",
    "entropy_change_nats": "entropy change\n(nats)",
}


def dose_grid(table: pd.DataFrame, *, blocks: Sequence[int], n_blocks: int) -> Figure:
    """Returns dose–response curves: a row per outcome, a column per block, c on x.

    Args:
        table: columns `outcome` (keys of `OUTCOMES`), `edit`, `factor`, `block`, `estimate`,
            `low`, `high`, `untrained`; a rotation stands at the c whose displacement it matches.
        blocks: the columns.
        n_blocks: L; the last block's column is marked.
    """
    use_theme()
    figure, grid = plt.subplots(
        len(OUTCOMES), len(blocks), figsize=(WIDTH, 5.2), sharex=True, sharey="row", squeeze=False
    )
    for row, (outcome, words) in zip(grid, OUTCOMES.items(), strict=True):
        row[0].set_ylabel(words, fontsize="small")
        for axes, block in zip(row, blocks, strict=True):
            chosen = table[(table["outcome"] == outcome) & (table["block"] == block)]
            for edit in ("rotation", "scaling"):
                for untrained in (True, False):
                    one = chosen[(chosen["edit"] == edit) & (chosen["untrained"] == untrained)]
                    _draw_dose(axes, one, edit, untrained=untrained)
            _finish_dose(axes, last=block == n_blocks - 1)
    for axes, block in zip(grid[0], blocks, strict=True):
        last = " (last)" if block == n_blocks - 1 else ""
        axes.set_title(f"block {block}{last}", fontsize="small")
    grid[0, 0].set_ylim(-0.05, 1.05)
    for axes in grid[-1]:
        axes.set_xlabel("factor c", fontsize="small")
    _legend(figure, grid.flat)
    return figure


def temperature_curves(table: pd.DataFrame) -> Figure:
    """Returns the fitted temperatures of the edits, and the share of KL a temperature explains.

    Args:
        table: columns `edit`, `factor`, `estimate`, `low`, `high`, `temperature`, `untrained`.
    """
    if table.empty:
        return nothing_to_show()
    use_theme()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharex=True)
    for untrained in (True, False):
        for edit in ("rotation", "scaling"):
            one = table[(table["edit"] == edit) & (table["untrained"] == untrained)]
            _draw_dose(right, one, edit, untrained=untrained)
            fitted = one.assign(
                estimate=one["temperature"], low=one["temperature"], high=one["temperature"]
            )
            _draw_dose(left, fitted, edit, untrained=untrained)
    left.axhline(1, color="#444444", linewidth=0.8)
    left.set_ylabel("fitted temperature, median")
    left.set_title("Which temperature?", fontsize="small")
    right.set_ylim(-0.04, 1.04)
    right.set_ylabel("share of KL explained")
    right.set_title("How much of the change is it?", fontsize="small")
    for axes in (left, right):
        _finish_dose(axes, last=False)
        axes.set_xlabel("factor c")
    _legend(figure, (left, right))
    return figure


def dissociation(
    carried: pd.DataFrame,
    partial: pd.DataFrame,
    flips: pd.DataFrame,
    *,
    margin: float,
    transition: Transition,
    n_blocks: int,
) -> Figure:
    """Returns the chapter at one glance: what the norm carries, says, and decides, over depth.

    Args:
        carried: `attribute`, `block`, `estimate`, `low`, `high`, `untrained`.
        partial: rows of `relation_curves`.
        flips: rows of `exchange_curves`.
        margin: the margin of equivalence.
        transition: ℓ* with its interval, or None.
        n_blocks: L.
    """
    use_theme()
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(WIDTH, 8.2), sharex=True)
    for attribute in dict.fromkeys(carried["attribute"]):
        for untrained in (True, False):
            one = carried[
                (carried["attribute"] == attribute) & (carried["untrained"] == untrained)
            ].sort_values("block")
            if one.empty:
                continue
            style = dict(CARRIED[attribute])
            if untrained:
                style |= {"color": TWIN, "linestyle": "--", "markerfacecolor": "white"}
            top.plot(one["block"], one["estimate"], label=_who(attribute, untrained), **style)
            top.fill_between(
                one["block"], one["low"], one["high"], color=style["color"], alpha=0.15, linewidth=0
            )
    top.set_ylabel("accuracy above\nshuffled labels", fontsize="small")
    top.set_title(
        "1  What is read off the norm, among prompts of the same answer", fontsize="small"
    )
    for untrained in (True, False):
        one = partial[
            (partial["curve"] == "norm given angle") & (partial["untrained"] == untrained)
        ]
        if len(one):
            draw_curve(
                middle, one, "norm", untrained=untrained, label=_who("norm given angle", untrained)
            )
    _draw_margin(middle, margin)
    middle.set_ylim(-0.3, 0.3)
    middle.set_ylabel("partial correlation\nwith J", fontsize="small")
    middle.set_title("2  What the norm says of predictions beyond the angle", fontsize="small")
    chosen = flips[flips["outcome"] == "flip rate"]
    for edit, name in NAMES.items():
        for untrained in (True, False):
            one = chosen[(chosen["edit"] == edit) & (chosen["untrained"] == untrained)]
            if len(one):
                label = _who(name, untrained)
                draw_curve(bottom, one, EDIT_STYLES[edit], untrained=untrained, label=label)
                _tell_twins_apart(bottom, edit, untrained=untrained)
    bottom.set_ylim(-0.04, 1.04)
    bottom.set_ylabel("flip rate", fontsize="small")
    bottom.set_title("3  Answers that follow an exchange", fontsize="small")
    bottom.set_xlabel("block")
    for axes in (top, middle, bottom):
        axes.axhline(0, color="#444444", linewidth=0.8)
        _finish_depth(axes, n_blocks, transition, labelled=False)
    _legend(figure, (top, middle, bottom))
    return figure


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Puts one legend below all panels, each name once, the model's before its twin's."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: "untrained" in label)
    figure.legend([entries[label] for label in labels], labels, loc="outside lower center", ncols=2)


def _who(name: str, untrained: bool) -> str:
    return f"{name}, untrained" if untrained else name


def _draw_margin(axes: Axes, margin: float) -> None:
    axes.axhspan(-margin, margin, color="#56b4e9", alpha=0.15, linewidth=0, label=f"±{margin:g}")
    axes.axhline(0, color="#444444", linewidth=0.8)


def _tell_twins_apart(axes: Axes, edit: str, *, untrained: bool) -> None:
    """Dots the twin's second curve, since both are grey."""
    if untrained and edit == "direction":
        axes.lines[-1].set_linestyle(":")


def _draw_dose(axes: Axes, one: pd.DataFrame, edit: str, *, untrained: bool) -> None:
    if one.empty:
        return
    one = one.sort_values("factor")
    style = style_of(EDIT_STYLES[edit], untrained=untrained)
    if untrained and edit == "rotation":
        style["linestyle"] = ":"
    words = "scaling by c" if edit == "scaling" else "random rotation, as far"
    axes.plot(one["factor"], one["estimate"], label=_who(words, untrained), **style)
    axes.fill_between(
        one["factor"], one["low"], one["high"], color=style["color"], alpha=0.15, linewidth=0
    )


def _finish_dose(axes: Axes, *, last: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    axes.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
    if last:
        axes.set_facecolor("#f2f2f2")


def _finish_depth(
    axes: Axes, n_blocks: int, transition: Transition, *, labelled: bool = True
) -> None:
    if transition is not None:
        mark_transition(axes, *transition)
    mark_last_block(axes, n_blocks)
    axes.set_xlim(-0.5, n_blocks - 0.5)
    if labelled:
        axes.set_xlabel("block")
