"""Mantel's test: the correlation of dissimilarity matrices when their items are shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.science.correlations import Method, off_diagonal, partial_correlation, rank_matrix

FloatArray = NDArray[np.float64]

Alternative = Literal["two-sided", "greater", "less"]
_PERMUTATIONS_AT_ONCE = 16


@dataclass(frozen=True)
class MantelResult:
    """A correlation of two dissimilarity matrices beside its permutation null."""

    correlation: float
    p_value: float
    n_permutations: int
    n_items: int
    null_low: float  # 2.5 % and 97.5 % quantiles of the correlation under permutation
    null_high: float
    method: Method
    alternative: Alternative


def mantel_test(
    first: ArrayLike,
    second: ArrayLike,
    *,
    n_permutations: int,
    rng: np.random.Generator,
    given: ArrayLike | None = None,
    method: Method = "spearman",
    alternative: Alternative = "two-sided",
) -> MantelResult:
    """Return the correlation of two dissimilarity matrices and its p-value when items are shuffled.

    The items of ``second`` are permuted, rows and columns together; p = (1 + b) / (1 + N), b the
    permutations at least as extreme (Mantel 1967; for the 1, Phipson and Smyth 2010,
    doi:10.2202/1544-6115.1585). With ``given``, the partial Mantel test (Smouse, Long and Sokal
    1986): ``second`` is permuted and the partial correlation taken anew.

    Args:
        first: ``[n_items, n_items]`` dissimilarity matrix.
        second: The same items in the same order.
        n_permutations: N, 1,000 or more for a p-value that is reported.
        rng: Source of the permutations.
        given: Matrix to be partialled out.
        method: Ranks or values.
        alternative: ``two-sided`` compares absolute values.

    Raises:
        ValueError: As `rank_matrix`; sizes that differ; as `partial_correlation`.
    """
    return mantel_tests(
        [first],
        second,
        n_permutations=n_permutations,
        rng=rng,
        given=None if given is None else [given],
        method=method,
        alternative=alternative,
    )[0]


def mantel_tests(
    firsts: Sequence[ArrayLike],
    second: ArrayLike,
    *,
    n_permutations: int,
    rng: np.random.Generator,
    given: Sequence[ArrayLike] | None = None,
    method: Method = "spearman",
    alternative: Alternative = "two-sided",
) -> list[MantelResult]:
    """Return `mantel_test` of several matrices (one a block, say) against one, same permutations.

    Much cheaper than one by one: ``second`` is permuted once for all of them. ``given`` holds one
    matrix for each of ``firsts``.
    """
    if method not in ("spearman", "pearson"):
        raise ValueError(f"method must be 'spearman' or 'pearson'; got {method!r}.")
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(
            f"alternative must be 'two-sided', 'greater' or 'less'; got {alternative!r}."
        )
    if n_permutations < 1:
        raise ValueError(f"Need at least 1 permutation; got {n_permutations}.")
    orders = np.stack([rng.permutation(len(np.asarray(second))) for _ in range(n_permutations)])
    observed, null = permuted_correlations(firsts, second, orders, given=given, method=method)
    n_firsts = len(firsts)
    return [
        MantelResult(
            correlation=float(observed[b]),
            p_value=permutation_p_value(observed[b], null[:, b], alternative),
            n_permutations=n_permutations,
            n_items=orders.shape[1],
            null_low=float(np.quantile(null[:, b], 0.025)),
            null_high=float(np.quantile(null[:, b], 0.975)),
            method=method,
            alternative=alternative,
        )
        for b in range(n_firsts)
    ]


def permuted_correlations(
    firsts: Sequence[ArrayLike],
    second: ArrayLike,
    orders: NDArray[np.int64],
    *,
    given: Sequence[ArrayLike] | None = None,
    method: Method = "spearman",
) -> tuple[FloatArray, FloatArray]:
    """Return the correlations of several matrices with one, and the same under given permutations.

    What `mantel_tests` is made of, for a statistic that joins several of them (their mean over
    templates, say).

    Args:
        firsts: Dissimilarity matrices ``[n_items, n_items]``.
        second: The one whose items are permuted.
        orders: A permutation of the items in each row, ``[n_permutations, n_items]``.
        given: A matrix to be partialled out, one for each of ``firsts``.
        method: Ranks or values.

    Returns:
        ``[n_firsts]`` and ``[n_permutations, n_firsts]``.

    Raises:
        ValueError: As `mantel_test`.
    """
    if given is not None and len(given) != len(firsts):
        raise ValueError(f"Need a given matrix for each of {len(firsts)}; got {len(given)}.")
    target = _unit_matrix(second, method)
    fixed = [_unit_matrix(matrix, method) for matrix in [*firsts, *(given or [])]]
    if any(matrix.shape != target.shape for matrix in fixed) or orders.shape[1] != len(target):
        raise ValueError("All matrices and permutations must have one size, that of the second.")
    upper = np.triu_indices(len(target), 1)
    flat = np.stack([matrix[upper] for matrix in fixed])
    null = _permuted_products(flat, target, orders)
    observed = flat @ target[upper]
    n_firsts = len(firsts)
    if given is None:
        return observed, null
    between = np.einsum("bp,bp->b", flat[:n_firsts], flat[n_firsts:])
    return (
        _partial(observed[:n_firsts], observed[n_firsts:], between),
        _partial(null[:, :n_firsts], null[:, n_firsts:], between),
    )


def _unit_matrix(matrix: ArrayLike, method: Method) -> FloatArray:
    """Return it standardised: products of two, summed over pairs, are their correlation."""
    ranked = rank_matrix(matrix)  # Checks the matrix for either method.
    centred = off_diagonal(ranked if method == "spearman" else matrix)
    result: FloatArray = centred / np.sqrt(len(centred) * (len(centred) - 1) / 2)
    return result


def _permuted_products(
    fixed: FloatArray, target: FloatArray, orders: NDArray[np.int64]
) -> FloatArray:
    """Return the correlations with the permuted target, ``[n_permutations, n_fixed]``."""
    n_permutations, n_items = orders.shape
    rows, columns = np.triu_indices(n_items, 1)
    flat = target.ravel()
    result = np.empty((n_permutations, len(fixed)))
    shuffled = np.empty((_PERMUTATIONS_AT_ONCE, len(rows)))
    for start in range(0, n_permutations, _PERMUTATIONS_AT_ONCE):
        chunk = orders[start : start + _PERMUTATIONS_AT_ONCE]
        for k, order in enumerate(chunk):
            # "clip" spares a copy: the default mode buffers the output, at several times the cost.
            np.take(flat, order[rows] * n_items + order[columns], out=shuffled[k], mode="clip")
        result[start : start + len(chunk)] = (fixed @ shuffled[: len(chunk)].T).T
    return result


def _partial(r_first: FloatArray, r_given: FloatArray, between: FloatArray) -> FloatArray:
    """Return the partial correlation of first and second from the three plain ones."""
    ones = np.ones_like(r_first)
    between = np.broadcast_to(between, r_first.shape)
    rows = [[ones, r_first, between], [r_first, ones, r_given], [between, r_given, ones]]
    return partial_correlation(np.moveaxis(np.array(rows), (0, 1), (-2, -1)))


def permutation_p_value(
    observed: float, null: FloatArray, alternative: Alternative = "two-sided"
) -> float:
    """Return (1 + b) / (1 + N), b of the N values under permutation at least as extreme."""
    tolerance = 1e-12  # The same permutation must not lose to itself by rounding.
    if alternative == "two-sided":
        extreme = np.abs(null) >= abs(observed) - tolerance
    elif alternative == "greater":
        extreme = null >= observed - tolerance
    else:
        extreme = null <= observed + tolerance
    return float((1 + extreme.sum()) / (1 + len(null)))
