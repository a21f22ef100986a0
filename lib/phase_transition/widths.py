"""How sharply a curve over depth changes: its 10-90 % width, beside that of the causal switch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.science.logistic import fit_logistic
from lib.science.stats import Interval, percentile_interval
from lib.science.transitions import SMALLEST_CHANGE, Transition

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class CurveWidth:
    """The 10-90 % width and the centre of one curve over depth (blocks), with intervals.

    Numbers are None when the curve has no such change; ``reason`` then says why.
    """

    found: bool
    reason: str
    n_blocks: int
    n_items: int
    width: float | None = None
    low: float | None = None
    high: float | None = None
    centre: float | None = None
    centre_low: float | None = None
    centre_high: float | None = None
    draws: FloatArray = field(default_factory=lambda: np.empty(0), repr=False)  # widths [n_draws]

    def __post_init__(self) -> None:
        if self.found == (self.width is None) or self.found == bool(self.reason):
            raise ValueError("A curve has either a width or a reason why it has none.")


def curve_width(
    curve: ArrayLike,
    draws: ArrayLike,
    *,
    falling: bool,
    n_items: int,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    smallest_change: float = SMALLEST_CHANGE,
    level: float = 0.95,
) -> CurveWidth:
    """Return the 10-90 % width of one curve, a correlation over depth say, from its logistic fit.

    The width is that of the fitted change, whichever asymptotes it runs between. It is at most L: a
    straight line, which has no bend to fit, comes out as wide as the depth.

    Args:
        curve: ``[n_blocks]``.
        draws: ``[n_draws, n_blocks]``, bootstrap over items.
        falling: Whether the curve falls with depth.
        n_items: Items behind the curve.
        bounds: Range of the asymptotes, None if free.
        smallest_change: A curve that changes by less has no width.
        level: Level of the intervals.

    Raises:
        ValueError: As `fit_logistic`.
    """
    fit = fit_logistic(curve, falling=falling, bounds=bounds)
    if fit.change < smallest_change:
        reason = (
            f"the curve {'falls' if falling else 'rises'} by {float(fit.change):.2f} over the "
            f"depth, less than {smallest_change}"
        )
        return CurveWidth(False, reason, fit.n_blocks, n_items)
    samples = np.asarray(draws, dtype=np.float64)
    defined = np.isfinite(samples).all(axis=1)
    fits = fit_logistic(samples[defined], falling=falling, bounds=bounds)
    widths, centres = np.full((2, len(samples)), np.nan)
    widths[defined], centres[defined] = fits.width, fits.centre
    extent = percentile_interval(float(fit.width), widths, n=n_items, level=level)
    place = percentile_interval(float(fit.centre), centres, n=n_items, level=level)
    return CurveWidth(
        found=True,
        reason="",
        n_blocks=fit.n_blocks,
        n_items=n_items,
        width=extent.estimate,
        low=extent.low,
        high=extent.high,
        centre=place.estimate,
        centre_low=place.low,
        centre_high=place.high,
        draws=widths,
    )


def width_difference(geometry: CurveWidth, causal: Transition, *, level: float = 0.95) -> Interval:
    """Return width(geometry) − width(causal) in blocks; above 0: geometry changes more gradually.

    Paired: draw k of both must come from the same item weights.

    Raises:
        ValueError: One of the two was not found, numbers of draws that differ.
    """
    if geometry.width is None or causal.width is None:
        raise ValueError(f"No width to compare: {geometry.reason or causal.reason}.")
    if geometry.draws.shape != causal.width_draws.shape:
        raise ValueError(
            f"Both need the same draws; got {len(geometry.draws)} and {len(causal.width_draws)}."
        )
    return percentile_interval(
        geometry.width - causal.width,
        geometry.draws - causal.width_draws,
        n=causal.n_prompts,
        level=level,
    )
