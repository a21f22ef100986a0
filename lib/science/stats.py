"""Bootstrap over prompts, equivalence tests, Holm's correction.

The unit of inference is the item (a prompt or a context), never the pair. A bootstrap draw is a
vector of item weights, how often each item was drawn; a pair of different items (i, j) then counts
w_i·w_j times. One matrix of weights, ``[n_draws, n_items]``, serves every block and every measure,
so that differences between them are paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

FloatArray = NDArray[np.float64]

_PAIR_WEIGHTS_AT_ONCE = 4_000_000
# At most this share of the draws may be undefined (a draw of too few different items).
_UNDEFINED_ALLOWED = 0.05


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; ``n`` counts the items (prompts or contexts) behind it."""

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95


# --- bootstrap -----------------------------------------------------------------------------------


def bootstrap_weights(n_items: int, n_draws: int, rng: np.random.Generator) -> FloatArray:
    """Return item weights of bootstrap draws, ``[n_draws, n_items]``; each row sums to n_items.

    How often each item occurs among n_items drawn with replacement. A draw of fewer than three
    different items, in which no correlation exists, is drawn again.

    Raises:
        ValueError: Fewer than three items or no draws.
    """
    if n_items < 3 or n_draws < 1:
        raise ValueError(f"Need at least 3 items and 1 draw; got {n_items} and {n_draws}.")
    shares = np.full(n_items, 1 / n_items)
    weights = rng.multinomial(n_items, shares, size=n_draws)
    while (poor := (weights > 0).sum(axis=1) < 3).any():
        weights[poor] = rng.multinomial(n_items, shares, size=int(poor.sum()))
    return weights.astype(np.float64)


def weighted_mean(values: ArrayLike, weights: FloatArray) -> FloatArray:
    """Return the mean over items in each draw, ``[n_draws, ...]`` for ``[n_items, ...]`` values.

    Raises:
        ValueError: A value that is not finite, weights for another number of items.
    """
    table = np.asarray(values, dtype=np.float64)
    if not np.isfinite(table).all():
        raise ValueError("values must be finite; leave out items without a value.")
    if weights.ndim != 2 or weights.shape[1] != len(table):
        raise ValueError(f"weights must be [n_draws, {len(table)}]; got shape {weights.shape}.")
    totals = weights.sum(axis=1).reshape(-1, *[1] * (table.ndim - 1))
    means: FloatArray = np.tensordot(weights, table, axes=1) / totals
    return means


def percentile_interval(
    estimate: float, draws: ArrayLike, *, n: int, level: float = 0.95
) -> Interval:
    """Return the interval between the two tail quantiles of the draws (percentile bootstrap).

    A draw without a value (NaN) is left out; more than one in twenty are an error.

    Raises:
        ValueError: An estimate that is not finite, too many draws without a value.
    """
    values = np.asarray(draws, dtype=np.float64).ravel()
    defined = values[np.isfinite(values)]
    if not np.isfinite(estimate):
        raise ValueError(f"estimate must be finite; got {estimate}.")
    if len(defined) < max((1 - _UNDEFINED_ALLOWED) * len(values), 1):
        raise ValueError(f"{len(values) - len(defined)} of {len(values)} draws have no value.")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high), n, level)


def bootstrap_interval(values: ArrayLike, weights: FloatArray, *, level: float = 0.95) -> Interval:
    """Return the mean of one value per item, ``[n_items]``, with its interval over items.

    Raises:
        ValueError: As `weighted_mean` and `percentile_interval`.
    """
    table = np.asarray(values, dtype=np.float64)
    draws = weighted_mean(table, weights)
    return percentile_interval(float(table.mean()), draws, n=len(table), level=level)


def bootstrap_difference(
    first: ArrayLike, second: ArrayLike, weights: FloatArray, *, level: float = 0.95
) -> Interval:
    """Return mean(first) − mean(second), paired by item, with its interval over items.

    Raises:
        ValueError: Shapes that differ; as `weighted_mean` and `percentile_interval`.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"first and second must have one shape; got {a.shape} and {b.shape}.")
    return bootstrap_interval(a - b, weights, level=level)


def pair_share_bootstrap(outcome: ArrayLike, pairs: ArrayLike, weights: FloatArray) -> FloatArray:
    """Return the weighted share of pairs with the outcome in each draw, ``[n_draws, n_blocks]``.

    Recipient and donor are both drawn from the prompts, so a pair counts w_recipient·w_donor times
    (Owen 2007, "The pigeonhole bootstrap", doi:10.1214/07-AOAS122). NaN in a draw that has none of
    the pairs; `percentile_interval` knows what to do with it.

    Args:
        outcome: ``[n_blocks, n_pairs]``: flipped or not, or any number.
        pairs: ``[n_pairs, 2]`` item numbers of recipient and donor, or ``[n_pairs]`` if the donor
            is no item (a centroid).
        weights: ``[n_draws, n_items]`` of `bootstrap_weights`; a row of ones gives the estimate.

    Raises:
        ValueError: Shapes that do not fit, an outcome that is not finite.
    """
    values = np.atleast_2d(np.asarray(outcome, dtype=np.float64))
    members = np.asarray(pairs, dtype=np.int64)
    members = members[:, None] if members.ndim == 1 else members
    if values.shape[1] != len(members) or members.max() >= weights.shape[1] or members.min() < 0:
        raise ValueError(
            f"Expected outcome [n_blocks, n_pairs], pairs [n_pairs, 2], weights [n_draws, items]; "
            f"got {values.shape}, {members.shape}, {weights.shape}, which do not fit."
        )
    if not np.isfinite(values).all():
        raise ValueError("outcome must be finite; leave out pairs without an outcome.")
    shares = np.full((len(weights), len(values)), np.nan)
    step = max(_PAIR_WEIGHTS_AT_ONCE // len(members), 1)
    for start in range(0, len(weights), step):
        counts = weights[start : start + step][:, members].prod(axis=2)
        totals = counts.sum(axis=1, keepdims=True)
        np.divide(counts @ values.T, totals, out=shares[start : start + step], where=totals > 0)
    return shares


# --- equivalence and multiple tests --------------------------------------------------------------


@dataclass(frozen=True)
class EquivalenceResult:
    """Two one-sided tests (TOST): ``[low, high]`` is the interval of level 1 − 2·alpha."""

    estimate: float
    low: float
    high: float
    margin: float
    alpha: float
    p_value: float
    equivalent: bool
    n: int


def equivalence_test(
    estimate: float, draws: ArrayLike, *, margin: float, n: int, alpha: float = 0.05
) -> EquivalenceResult:
    """Return whether an estimate is inside ±margin, from its bootstrap draws.

    Equivalent if the percentile interval of level 1 − 2·alpha (90 %) lies inside (−margin, margin),
    which is TOST at alpha (Schuirmann 1987, doi:10.1007/BF01068419). The p-value is the larger of
    the shares of draws at or beyond either margin, (1 + b) / (1 + N).

    Raises:
        ValueError: A margin that is not positive; as `percentile_interval`.
    """
    _check_margin(margin)
    inner = percentile_interval(estimate, draws, n=n, level=1 - 2 * alpha)
    values = np.asarray(draws, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    beyond = max(int((values >= margin).sum()), int((values <= -margin).sum()))
    return EquivalenceResult(
        estimate=inner.estimate,
        low=inner.low,
        high=inner.high,
        margin=margin,
        alpha=alpha,
        p_value=(1 + beyond) / (1 + len(values)),
        equivalent=-margin < inner.low and inner.high < margin,
        n=n,
    )


def equivalence_test_mean(
    values: ArrayLike, *, margin: float, alpha: float = 0.05
) -> EquivalenceResult:
    """Return whether the mean of independent values is inside ±margin, by two one-sided t-tests.

    p = P(T ≥ (margin − |mean|) / s), the larger of the two one-sided p-values, with T Student's t
    on n − 1 degrees of freedom and s the standard error (Schuirmann 1987, doi:10.1007/BF01068419).

    Raises:
        ValueError: A margin that is not positive, fewer than three values, values that are all
            equal or not finite.
    """
    _check_margin(margin)
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 3 or not np.isfinite(sample).all():
        raise ValueError(f"values must be at least 3 finite numbers; got shape {sample.shape}.")
    mean = float(sample.mean())
    error = float(sample.std(ddof=1) / np.sqrt(len(sample)))
    if error == 0:
        raise ValueError("values are all equal: their mean has no standard error.")
    freedom = len(sample) - 1
    reach = float(student_t.ppf(1 - alpha, freedom)) * error
    p_value = float(student_t.sf((margin - abs(mean)) / error, freedom))
    return EquivalenceResult(
        estimate=mean,
        low=mean - reach,
        high=mean + reach,
        margin=margin,
        alpha=alpha,
        p_value=p_value,
        equivalent=-margin < mean - reach and mean + reach < margin,
        n=len(sample),
    )


def _check_margin(margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"margin must be positive; got {margin}.")


def holm(p_values: ArrayLike) -> FloatArray:
    """Return p-values adjusted for their number by Holm's step-down method, in the given order.

    The k-th smallest of m is multiplied by m − k + 1, made monotone and capped at 1 (Holm 1979,
    "A simple sequentially rejective multiple test procedure"). Controls the family-wise error under
    any dependence.

    Raises:
        ValueError: No p-values, or one outside [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p_values must be at least one number in [0, 1].")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    result: FloatArray = np.minimum(adjusted, 1)
    return result
