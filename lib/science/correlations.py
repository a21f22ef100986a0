"""Rank correlation of dissimilarity matrices: bootstrap over items, partial.

The matrices are ranked once; a bootstrap draw is then a vector of item weights (`lib.science.stats`), and
a pair of different items (i, j) counts w_i·w_j times in it. Every weighted sum over pairs is a
quadratic form, so all costs are quadratic in the number of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

FloatArray = NDArray[np.float64]
Method = Literal["spearman", "pearson"]


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
    n_matrices = len(matrices)
    pairs = [(i, j) for i in range(n_matrices) for j in range(i, n_matrices)]
    values = correlations_of_pairs(matrices, pairs, weights)
    result = np.empty((len(weights), n_matrices, n_matrices))
    for column, (i, j) in enumerate(pairs):
        result[:, i, j] = result[:, j, i] = values[:, column]
    return result


def correlations_of_pairs(
    matrices: Sequence[ArrayLike], pairs: Sequence[tuple[int, int]], weights: FloatArray
) -> FloatArray:
    """Return the correlations of the named pairs of matrices in each draw, ``[n_draws, n_pairs]``.

    As `weighted_correlations`, which takes all pairs; cheaper where few are wanted.
    """
    stack = np.stack([off_diagonal(matrix) for matrix in matrices])
    _, n_items, _ = stack.shape
    if weights.shape[1] != n_items:
        raise ValueError(f"weights must be [n_draws, {n_items}]; got shape {weights.shape}.")
    n_pairs = np.square(weights.sum(axis=1)) - np.square(weights).sum(axis=1)

    def pair_mean(matrix: FloatArray) -> FloatArray:
        total: FloatArray = np.einsum("di,di->d", weights @ matrix, weights)
        return total / n_pairs

    used = sorted({index for pair in pairs for index in pair})
    means = {i: pair_mean(stack[i]) for i in used}
    variances = {i: pair_mean(np.square(stack[i])) - np.square(means[i]) for i in used}
    for values in variances.values():
        values[values < 1e-12] = np.nan  # Of matrices whose variance over all pairs is 1.
    result = np.empty((len(weights), len(pairs)))
    for column, (i, j) in enumerate(pairs):
        covariance = variances[i]
        if i != j:
            covariance = pair_mean(stack[i] * stack[j]) - means[i] * means[j]
        result[:, column] = covariance / np.sqrt(variances[i] * variances[j])
    clipped: FloatArray = np.clip(result, -1, 1)
    return clipped


def off_diagonal(matrix: ArrayLike) -> FloatArray:
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


def partial_correlation(
    correlations: ArrayLike, *, determined: Literal["raise", "nan"] = "raise"
) -> FloatArray:
    """Return the correlation of variables 0 and 1 given all the others, over the leading axes.

    From the inverse P of the correlation matrix, −P₀₁ / √(P₀₀·P₁₁); with one given variable
    (r₀₁ − r₀₂·r₁₂) / √((1 − r₀₂²)(1 − r₁₂²)).

    Args:
        correlations: ``[..., n_variables, n_variables]``, as `weighted_correlations` returns them.
        determined: What to do where variable 0 or 1 is determined by the given ones: raise, or
            return NaN, for bootstrap draws of few different items.

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
    lost = np.any(variances < 1e-9, axis=1)
    if lost.any() and determined == "raise":
        raise ValueError(
            "A variable is determined by the given ones: its partial correlation is undefined."
        )
    variances = np.where(np.expand_dims(lost, 1), np.nan, variances)
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
