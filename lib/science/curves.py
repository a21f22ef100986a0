"""Curves over depth: which blocks count, how wide a change is, where two curves cross."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

FloatArray = NDArray[np.float64]

LEAST_CHANGE = 0.05
"""A curve whose fit changes by less neither falls nor rises."""


def early_blocks(n_blocks: int) -> range:
    """Return the blocks from L/4 to L/2, both included where whole.

    Raises:
        ValueError: fewer than four blocks.
    """
    _check_depth(n_blocks)
    return range(math.ceil(n_blocks / 4), n_blocks // 2 + 1)


def late_blocks(n_blocks: int, transition: float) -> range:
    """Return the blocks from the transition ℓ* to L − 2; the last block never counts.

    Untrained twins have no transition of their own: they are compared at the trained model's.

    Raises:
        ValueError: fewer than four blocks, a transition that leaves no block.
    """
    _check_depth(n_blocks)
    if not 0 <= transition <= n_blocks - 2:
        raise ValueError(
            f"No late blocks: the transition must be from 0 to {n_blocks - 2}; got {transition}."
        )
    return range(math.ceil(transition), n_blocks - 1)


def last_sixth(n_blocks: int) -> range:
    """Return the last L/6 blocks, rounded up, without the last one of all; at least one.

    Raises:
        ValueError: fewer than four blocks.
    """
    _check_depth(n_blocks)
    return range(min(n_blocks - math.ceil(n_blocks / 6), n_blocks - 2), n_blocks - 1)


def _check_depth(n_blocks: int) -> None:
    if n_blocks < 4:
        raise ValueError(f"Need at least 4 blocks to tell early from late; got {n_blocks}.")


def width(curve: ArrayLike, *, rising: bool) -> float:
    """Return the distance between 10 % and 90 % of a curve's fall or rise, in blocks.

    Of its isotonic regression, read between blocks by a straight line; no shape is fitted. NaN for
    a curve `[n_blocks]` that does not fall or rise.
    """
    fit = _monotone(curve, rising=rising)
    change = fit[-1] - fit[0]
    if not change >= LEAST_CHANGE:
        return math.nan
    low, high = (_reach(fit, fit[0] + share * change) for share in (0.1, 0.9))
    return high - low


def crossing(falling: ArrayLike, rising: ArrayLike) -> float:
    """Return the block, between blocks where need be, at which two curves `[n_blocks]` cross.

    Of the isotonic regressions of both; NaN where the first does not start above the second or does
    not end below it.
    """
    gap = _monotone(falling, rising=False) + _monotone(rising, rising=True)  # −(falling − rising)
    if not gap[0] < 0 < gap[-1]:
        return math.nan
    return _reach(gap, 0.0)


def _monotone(curve: ArrayLike, *, rising: bool) -> FloatArray:
    """Return the isotonic regression of a rising curve, or of a falling one turned over."""
    values = np.asarray(curve, dtype=np.float64)
    return isotonic_regression(values if rising else -values).x


def _reach(fit: FloatArray, level: float) -> float:
    """Return where a rising fit first reaches a level, by a straight line between two blocks."""
    after = int(np.argmax(fit >= level))
    if after == 0:
        return 0.0
    before = after - 1
    return float(before + (level - fit[before]) / (fit[after] - fit[before]))
