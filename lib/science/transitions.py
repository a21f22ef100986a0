"""The switch from context to prediction: where in depth the two causal arms cross, how sharply.

What cannot be read off the arms (a flat one, arms that do not cross) is `found=False` with a
reason, never a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.science.logistic import LogisticFit, fit_logistic
from lib.science.stats import Interval, percentile_interval

FloatArray = NDArray[np.float64]

# Below this change over the depth a curve counts as flat: it has no place where it switches.
SMALLEST_CHANGE = 0.2


@dataclass(frozen=True)
class Transition:
    """The switch ℓ* from context to prediction: its block and its 10-90 % width, with intervals.

    Numbers are in blocks and None when no switch was found; ``reason`` then says why.
    """

    found: bool
    reason: str
    n_blocks: int
    n_prompts: int
    block: float | None = None  # where the fitted arms cross
    low: float | None = None
    high: float | None = None
    width: float | None = None  # of the wider of the two arms
    width_low: float | None = None
    width_high: float | None = None
    width_context: float | None = None
    width_prediction: float | None = None
    block_draws: FloatArray = field(default_factory=lambda: np.empty(0), repr=False)  # [n_draws]
    width_draws: FloatArray = field(default_factory=lambda: np.empty(0), repr=False)

    def __post_init__(self) -> None:
        if self.found == (self.block is None) or self.found == bool(self.reason):
            raise ValueError("A transition has either a block or a reason why it has none.")

    @property
    def width_share(self) -> Interval | None:
        """The width as a share of the depth L, with its interval; None when not found."""
        if self.width is None or self.width_low is None or self.width_high is None:
            return None
        shares = (self.width / self.n_blocks, self.width_low / self.n_blocks)
        return Interval(*shares, self.width_high / self.n_blocks, self.n_prompts)


def find_transition(
    context: ArrayLike,
    prediction: ArrayLike,
    context_draws: ArrayLike,
    prediction_draws: ArrayLike,
    *,
    n_prompts: int,
    level: float = 0.95,
) -> Transition:
    """Return the block ℓ* where the falling context arm and the rising prediction arm cross.

    A logistic curve is fitted to each arm, with asymptotes within [0, 1]; ℓ* solves
    context(ℓ*) = prediction(ℓ*). Its width is that of the wider arm. Both have percentile intervals
    over the draws, which must come from the same weights for the two arms.

    Args:
        context: ``[n_blocks]`` share of pairs that follow the donor, context arm.
        prediction: ``[n_blocks]``, prediction arm.
        context_draws: ``[n_draws, n_blocks]`` of `pair_share_bootstrap`.
        prediction_draws: The same draws of the prediction arm.
        n_prompts: Prompts behind the curves.
        level: Level of the intervals.

    Returns:
        ``found`` is False, with the reason, when an arm changes by less than `SMALLEST_CHANGE`, the
        arms do not cross, or they do not in more than one draw in twenty.

    Raises:
        ValueError: As `fit_logistic`; draws of the two arms that differ in shape.
    """
    curves = [np.asarray(context, dtype=np.float64), np.asarray(prediction, dtype=np.float64)]
    draws = [np.asarray(d, dtype=np.float64) for d in (context_draws, prediction_draws)]
    n_blocks = len(curves[0])
    expected = (len(draws[0]), n_blocks)
    if curves[1].shape != (n_blocks,) or any(d.shape != expected for d in draws):
        raise ValueError(
            f"Expected curves [n_blocks] and draws [n_draws, n_blocks] of one size; got "
            f"{[a.shape for a in (*curves, *draws)]}."
        )

    def none(reason: str) -> Transition:
        return Transition(found=False, reason=reason, n_blocks=n_blocks, n_prompts=n_prompts)

    falling, rising = fit_logistic(curves[0], falling=True), fit_logistic(curves[1], falling=False)
    for arm, fit in (("context", falling), ("prediction", rising)):
        if fit.change < SMALLEST_CHANGE:
            return none(
                f"the {arm} arm changes by {float(fit.change):.2f} over the depth, "
                f"less than {SMALLEST_CHANGE}"
            )
    block = float(_crossing(falling, rising))
    if np.isnan(block):
        return none("the two arms do not cross")
    defined = np.isfinite(draws[0]).all(axis=1) & np.isfinite(draws[1]).all(axis=1)
    blocks, widths = np.full((2, len(draws[0])), np.nan)
    fits = [
        fit_logistic(draws[0][defined], falling=True),
        fit_logistic(draws[1][defined], falling=False),
    ]
    blocks[defined] = _crossing(*fits)
    widths[defined] = np.maximum(fits[0].width, fits[1].width)
    widths[np.isnan(blocks)] = np.nan
    width = float(max(falling.width, rising.width))
    try:
        place = percentile_interval(block, blocks, n=n_prompts, level=level)
        extent = percentile_interval(width, widths, n=n_prompts, level=level)
    except ValueError:
        share = float(np.isfinite(blocks).mean())
        return none(f"the two arms cross in only {share:.0%} of the bootstrap draws")
    return Transition(
        found=True,
        reason="",
        n_blocks=n_blocks,
        n_prompts=n_prompts,
        block=block,
        low=place.low,
        high=place.high,
        width=width,
        width_low=extent.low,
        width_high=extent.high,
        width_context=float(falling.width),
        width_prediction=float(rising.width),
        block_draws=blocks,
        width_draws=widths,
    )


def _crossing(falling: LogisticFit, rising: LogisticFit) -> FloatArray:
    """Return where the curves meet, by bisection; NaN where they do not between the end blocks."""
    left = np.zeros_like(falling.centre)
    right = np.full_like(left, falling.n_blocks - 1)
    meet = (falling.at(left) > rising.at(left)) & (falling.at(right) < rising.at(right))
    for _ in range(50):
        middle = (left + right) / 2
        before = falling.at(middle) > rising.at(middle)
        left, right = np.where(before, middle, left), np.where(before, right, middle)
    return np.where(meet, (left + right) / 2, np.nan)
