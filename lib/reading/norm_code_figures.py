"""Figures of the norm code."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.reading.figures import STYLES, TWIN, WIDTH, draw_curve, style_of, use_theme
from lib.science.estimate import Estimate, Measured


def gains_and_costs(
    gains: Mapping[str, Measured],
    twins: Mapping[str, Sequence[Measured]],
    exchanged: Mapping[str, Measured],
    blocks: Sequence[int],
) -> Figure:
    """Draw what log r tells, beside what an exchange of norms does to the prediction.

    Args:
        gains: by attribute, beyond shuffled labels.
        twins: the same numbers of the untrained twins, by attribute.
        exchanged: curves over `blocks` by the name of the edit, transfer T.
        blocks: after which the exchange was made.
    """
    use_theme()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 3.2), gridspec_kw={"width_ratios": [1.5, 1]}
    )
    _forest(left, gains, twins)
    for name, one in exchanged.items():
        if isinstance(one, Estimate):
            draw_curve(right, one.to_frame().assign(block=list(blocks)), name)
    right.axhline(0, color="#888888", linewidth=0.8)
    right.axhline(0.05, color="#444444", linestyle=":", linewidth=1)
    right.set(ylim=(-0.15, 1.05), xlabel="block", ylabel="transfer T")
    right.set_xticks(list(blocks))
    right.set_title("what exchanging it does")
    if right.lines:
        right.legend(loc="center right")
    return figure


def _forest(
    axes: Axes, gains: Mapping[str, Measured], twins: Mapping[str, Sequence[Measured]]
) -> None:
    """Draw a row an attribute: the estimate with its interval, the twins as grey crosses."""
    colour = STYLES["norm"]["color"]
    for place, (name, one) in enumerate(gains.items()):
        others = [float(twin) for twin in twins.get(name, ()) if isinstance(twin, Estimate)]
        axes.scatter(others, np.full(len(others), place - 0.22), marker="x", s=18, color=TWIN)
        if isinstance(one, Estimate):
            axes.plot(one.interval(), [place, place], color=colour, linewidth=2)
            axes.plot(float(one), place, marker="v", color=colour, markersize=7)
        else:
            axes.annotate("not testable", (0, place), fontsize="small", color="#555555")
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(gains)), list(gains))
    axes.set_ylim(len(gains) - 0.5, -0.6)
    axes.set_xlabel("share decoded beyond shuffled labels")
    axes.set_title("what log r tells  (× untrained)")


def partials(curves: Mapping[str, Measured], late: Sequence[int], margin: float) -> Figure:
    """Draw partial ρ(|Δ log r|, J | θ) at each late block, 90 % intervals, the margin shaded."""
    use_theme()
    figure, panels = plt.subplots(
        1, len(curves), figsize=(WIDTH, 2.9), sharey=True, squeeze=False, sharex=True
    )
    for axes, (name, one) in zip(panels[0], curves.items(), strict=True):
        axes.axhspan(-margin, margin, color="#dddddd", alpha=0.5, linewidth=0)
        axes.axhline(0, color="#888888", linewidth=0.8)
        if isinstance(one, Estimate):
            frame = one.to_frame(level=0.9).assign(block=list(late))
            draw_curve(axes, frame, "norm", label=name)
        axes.set(title=name, xlabel="block", ylim=(-0.3, 0.3))
        axes.set_xticks(list(late))
    panels[0][0].set_ylabel("partial ρ(|Δ log r|, J | θ)")
    return figure


def doses(table: pd.DataFrame) -> Figure:
    """Draw what scaling the norm does: divergence, and the temperature that it amounts to."""
    use_theme()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    style = style_of("norm")
    left.plot(table["factor"], table["kl_nats"], label="whole", **style)
    left.plot(
        table["factor"],
        table["kl_left_nats"],
        label="beyond a temperature",
        **{**style, "linestyle": "--", "markerfacecolor": "white"},
    )
    left.set(xscale="log", xlabel="factor c of the norm", ylabel="KL from unedited, nats")
    left.legend()
    right.plot(table["factor"], table["temperature"], **style)
    right.axhline(1, color="#888888", linewidth=0.8)
    right.set(xscale="log", xlabel="factor c of the norm", ylabel="best-fitting temperature")
    for axes in (left, right):
        axes.set_xticks(table["factor"], [f"{factor:g}" for factor in table["factor"]], rotation=45)
        axes.minorticks_off()
    return figure
