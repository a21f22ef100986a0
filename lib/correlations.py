"""Rank correlation of dissimilarity matrices: bootstrap over items, partial, Mantel's test.

The matrices are ranked once; a bootstrap draw is then a vector of item weights (`lib.stats`), and
a pair of different items (i, j) counts w_i·w_j times in it. Every weighted sum over pairs is a
quadratic form, so all costs are quadratic in the number of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

FloatArray = NDArray[np.float64]
Alternative = Literal["two-sided", "greater", "less"]
Method = Literal["spearman", "pearson"]

_PERMUTATIONS_AT_ONCE = 16


def rank_matrix(matrix: ArrayLike) -> FloatArray:
    """Return the ranks 1 … n(n−1)/2 of the pairs as a symmetric matrix with zero diagonal.

    Ties get their average rank. ``[n_items, n_items]``.

    Raises:
        ValueError: Not a symmetric finite matrix of at least three items, or constant off the
            diagonal: its correlation with anything is undefined.
    """
    square = np.asarray(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1] or len(square) < 3:
        raise ValueError(
            f"A dissimilarity matrix is [n, n] with n of at least 3; got {square.shape}."
        )
    if not np.isfinite(square).all() or not np.array_equal(square, square.T):
        raise ValueError("A dissimilarity matrix must be finite and symmetric.")
    rows, columns = np.triu_indices(len(square), 1)
    pairs = square[rows, columns]
    if (pairs == pairs[0]).all():
        raise ValueError("The dissimilarity matrix is constant: it correlates with nothing.")
    result = np.zeros_like(square)
    result[rows, columns] = rankdata(pairs)
    result.T[rows, columns] = result[rows, columns]
    return result


def weighted_correlations(matrices: Sequence[ArrayLike], weights: FloatArray) -> FloatArray:
    """Return the correlations among matrices in each draw, ``[n_draws, n_matrices, n_matrices]``.

    Pearson's correlation over the pairs i ≠ j, weighted by w_i·w_j; of `rank_matrix` ranks it is
    Spearman's with the ranks of the whole sample, not ranked again in each draw. Every weighted sum
    over pairs is a quadratic form wᵀMw, so cost is quadratic in items. NaN where a matrix is
    constant in a draw.

    Args:
        matrices: Symmetric matrices ``[n_items, n_items]``; the diagonal is ignored.
        weights: ``[n_draws, n_items]``; a row of ones gives the estimate.
    """
    stack = np.stack([_off_diagonal(matrix) for matrix in matrices])
    n_matrices, n_items, _ = stack.shape
    if weights.shape[1] != n_items:
        raise ValueError(f"weights must be [n_draws, {n_items}]; got shape {weights.shape}.")

    def pair_sum(matrix: FloatArray) -> FloatArray:
        total: FloatArray = np.einsum("di,di->d", weights @ matrix, weights)
        return total

    n_pairs = np.square(weights.sum(axis=1)) - np.square(weights).sum(axis=1)
    means = np.stack([pair_sum(matrix) / n_pairs for matrix in stack])
    products = np.empty((len(weights), n_matrices, n_matrices))
    for i in range(n_matrices):
        for j in range(i, n_matrices):
            covariance = pair_sum(stack[i] * stack[j]) / n_pairs - means[i] * means[j]
            products[:, i, j] = products[:, j, i] = covariance
    variances = np.einsum("dii->di", products).copy()
    variances[variances < 1e-12] = np.nan  # Of matrices whose variance over all pairs is 1.
    scales = np.sqrt(variances)
    result: FloatArray = np.clip(products / (scales[:, :, None] * scales[:, None, :]), -1, 1)
    return result


def _off_diagonal(matrix: ArrayLike) -> FloatArray:
    """Return the matrix standardised over its off-diagonal entries, zero on the diagonal."""
    square = np.array(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1]:
        raise ValueError(f"matrices must be square; got shape {square.shape}.")
    off = ~np.eye(len(square), dtype=bool)
    square -= square[off].mean()
    spread = square[off].std()
    if not spread > 0:
        raise ValueError("A matrix is constant off its diagonal or not finite.")
    square[~off] = 0.0
    square /= spread
    return square


def weighted_pair_correlation(
    first: ArrayLike, second: ArrayLike, weights: FloatArray
) -> FloatArray:
    """Return the correlation of two (ranked) matrices in each draw, ``[n_draws]``.

    See `weighted_correlations`.
    """
    return weighted_correlations([first, second], weights)[:, 0, 1]


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Return Spearman's ρ of two dissimilarity matrices over their n(n−1)/2 pairs.

    Raises:
        ValueError: As `rank_matrix`; sizes that differ.
    """
    ranked = [rank_matrix(first), rank_matrix(second)]
    if ranked[0].shape != ranked[1].shape:
        raise ValueError(
            f"Matrices must have one size; got {ranked[0].shape} and {ranked[1].shape}."
        )
    return float(weighted_pair_correlation(ranked[0], ranked[1], np.ones((1, len(ranked[0]))))[0])


def partial_correlation(correlations: ArrayLike) -> FloatArray:
    """Return the correlation of variables 0 and 1 given all the others, over the leading axes.

    From the inverse P of the correlation matrix, −P₀₁ / √(P₀₀·P₁₁); with one given variable
    (r₀₁ − r₀₂·r₁₂) / √((1 − r₀₂²)(1 − r₁₂²)).

    Args:
        correlations: ``[..., n_variables, n_variables]``, as `weighted_correlations` returns them.

    Returns:
        ``[...]``; NaN where the correlations are NaN.

    Raises:
        ValueError: Variable 0 or 1 is determined by the given ones (θ given the lens at the last
            block is such a case): the partial correlation is then undefined.
    """
    matrix = np.asarray(correlations, dtype=np.float64)
    defined = np.isfinite(matrix).all(axis=(-2, -1))
    result = np.full(matrix.shape[:-2], np.nan)
    blocks = matrix[defined]
    cross, given = blocks[:, :2, 2:], blocks[:, 2:, 2:]
    residual = blocks[:, :2, :2]
    if matrix.shape[-1] > 2:
        residual = residual - cross @ np.linalg.pinv(given, hermitian=True) @ cross.swapaxes(1, 2)
    variances = residual[:, [0, 1], [0, 1]]
    if (variances < 1e-9).any():
        raise ValueError(
            "A variable is determined by the given ones: its partial correlation is undefined."
        )
    result[defined] = np.clip(residual[:, 0, 1] / np.sqrt(variances.prod(axis=1)), -1, 1)
    return result


def bootstrap_correlations(
    matrices: Sequence[ArrayLike], weights: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the rank correlations among dissimilarity matrices: estimate and bootstrap draws.

    Shapes ``[n_matrices, n_matrices]`` and ``[n_draws, n_matrices, n_matrices]``. Both feed
    `partial_correlation`; their differences are paired.

    Raises:
        ValueError: As `rank_matrix`.
    """
    ranked = [rank_matrix(matrix) for matrix in matrices]
    ones = np.ones((1, len(ranked[0])))
    draws = weighted_correlations(ranked, np.concatenate([ones, weights]))
    return draws[0], draws[1:]


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
    if n_permutations < 1 or (given is not None and len(given) != len(firsts)):
        raise ValueError("Need at least 1 permutation, and a given matrix for each first one.")
    target = _unit_matrix(second, method)
    fixed = [_unit_matrix(matrix, method) for matrix in [*firsts, *(given or [])]]
    if any(matrix.shape != target.shape for matrix in fixed):
        raise ValueError("All matrices must have one size, that of the second.")
    upper = np.triu_indices(len(target), 1)
    flat = np.stack([matrix[upper] for matrix in fixed])
    null = _permuted_products(flat, target, n_permutations, rng)
    observed = flat @ target[upper]
    n_firsts = len(firsts)
    if given is not None:
        between = np.einsum("bp,bp->b", flat[:n_firsts], flat[n_firsts:])
        observed = _partial(observed[:n_firsts], observed[n_firsts:], between)
        null = _partial(null[:, :n_firsts], null[:, n_firsts:], between)
    return [
        MantelResult(
            correlation=float(observed[b]),
            p_value=_permutation_p(observed[b], null[:, b], alternative),
            n_permutations=n_permutations,
            n_items=len(target),
            null_low=float(np.quantile(null[:, b], 0.025)),
            null_high=float(np.quantile(null[:, b], 0.975)),
            method=method,
            alternative=alternative,
        )
        for b in range(n_firsts)
    ]


def _unit_matrix(matrix: ArrayLike, method: Method) -> FloatArray:
    """Return it standardised: products of two, summed over pairs, are their correlation."""
    ranked = rank_matrix(matrix)  # Checks the matrix for either method.
    centred = _off_diagonal(ranked if method == "spearman" else matrix)
    result: FloatArray = centred / np.sqrt(len(centred) * (len(centred) - 1) / 2)
    return result


def _permuted_products(
    fixed: FloatArray, target: FloatArray, n_permutations: int, rng: np.random.Generator
) -> FloatArray:
    """Return the correlations with the permuted target, ``[n_permutations, n_fixed]``."""
    n_items = len(target)
    rows, columns = np.triu_indices(n_items, 1)
    flat = target.ravel()
    result = np.empty((n_permutations, len(fixed)))
    shuffled = np.empty((_PERMUTATIONS_AT_ONCE, len(rows)))
    for start in range(0, n_permutations, _PERMUTATIONS_AT_ONCE):
        n_here = min(_PERMUTATIONS_AT_ONCE, n_permutations - start)
        for k in range(n_here):
            order = rng.permutation(n_items)
            # "clip" spares a copy: the default mode buffers the output, at several times the cost.
            np.take(flat, order[rows] * n_items + order[columns], out=shuffled[k], mode="clip")
        result[start : start + n_here] = (fixed @ shuffled[:n_here].T).T
    return result


def _partial(r_first: FloatArray, r_given: FloatArray, between: FloatArray) -> FloatArray:
    """Return the partial correlation of first and second from the three plain ones."""
    ones = np.ones_like(r_first)
    between = np.broadcast_to(between, r_first.shape)
    rows = [[ones, r_first, between], [r_first, ones, r_given], [between, r_given, ones]]
    return partial_correlation(np.moveaxis(np.array(rows), (0, 1), (-2, -1)))


def _permutation_p(observed: float, null: FloatArray, alternative: Alternative) -> float:
    tolerance = 1e-12  # The same permutation must not lose to itself by rounding.
    if alternative == "two-sided":
        extreme = np.abs(null) >= abs(observed) - tolerance
    elif alternative == "greater":
        extreme = null >= observed - tolerance
    else:
        extreme = null <= observed + tolerance
    return float((1 + extreme.sum()) / (1 + len(null)))
