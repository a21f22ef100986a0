"""Rank correlation of dissimilarity matrices: estimates over items, partial, Mantel's test.

The matrices are ranked once; a draw is then a vector of item weights (`unit_weights`), and a pair
of different items (i, j) counts w_i·w_j times in it. Every weighted sum over pairs is a quadratic
form, so all costs are quadratic in the number of items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

from lib.science.estimate import FEWEST_UNITS, N_DRAWS, Estimate, Measured, Untested, unit_weights

FloatArray = NDArray[np.float64]

_UNDETERMINED = 1e-9


def correlate(
    firsts: Sequence[ArrayLike],
    second: ArrayLike,
    units: str,
    *,
    given: Sequence[ArrayLike] | None = None,
    among: NDArray[np.bool_] | None = None,
    n_draws: int = N_DRAWS,
) -> Measured:
    """Return Spearman's ρ of dissimilarity matrices with another, block by block, over items.

    Ranks are those of the whole sample, not taken again in each draw.

    Args:
        firsts: one matrix a block, `[n_blocks, n_items, n_items]`.
        second: the matrix to correlate with.
        units: what the items are called; numbers of equal units are paired.
        given: a matrix a block to partial out: the partial rank correlation.
        among: the pairs that are ranked and count, `[n_items, n_items]`; all by default.
        n_draws: how many draws over items, two at least; the value does not depend on it.

    Returns:
        ρ `[n_blocks]`; Untested for fewer than three items, a matrix that is constant, or one that
        the given one determines.

    Raises:
        ValueError: matrices that are not square, symmetric and finite, or of different sizes.
    """
    n_items = len(np.asarray(firsts[0]))
    if n_items < FEWEST_UNITS:
        return Untested(f"{n_items} {units}, at least {FEWEST_UNITS} are needed")
    weights = unit_weights(units, n_items, n_draws)
    variables = [[rank_matrix(one, among) for one in firsts]]
    variables.append([rank_matrix(second, among)] * len(firsts))
    if given is not None:
        variables.append([rank_matrix(one, among) for one in given])
    curve, pair_mean = [], pair_means(weights, among)
    for block, ranked in enumerate(zip(*variables, strict=True)):
        matrices = [matrix for matrix in ranked if matrix is not None]
        if len(matrices) < len(ranked):
            return Untested(f"all {units} are equally far from each other at block {block}")
        partial = partial_correlation(weighted_correlations(matrices, weights, pair_mean))
        if not np.isfinite(partial).all():
            return Untested(f"a correlation at block {block} is undefined in some draws of {units}")
        curve.append(partial)
    return Estimate(np.stack(curve, axis=1), units, n_items)


def rank_matrix(matrix: ArrayLike, among: NDArray[np.bool_] | None = None) -> FloatArray | None:
    """Return the ranks of the pairs, standardised, as a symmetric matrix with zero diagonal.

    Ties get their average rank. None for a matrix that is constant off its diagonal: its
    correlation with anything is undefined.

    Args:
        matrix: the dissimilarities.
        among: the pairs that are ranked, all by default; the others are zero in the result.

    Raises:
        ValueError: not a symmetric finite matrix of at least three items, or pairs of others.
    """
    square = np.asarray(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1] or len(square) < 3:
        raise ValueError(
            f"A dissimilarity matrix is [n, n] with n of at least 3; got {square.shape}."
        )
    if not np.isfinite(square).all() or not np.array_equal(square, square.T):
        raise ValueError("A dissimilarity matrix must be finite and symmetric.")
    if among is None:
        among = ~np.eye(len(square), dtype=bool)
    elif among.shape != square.shape or (among != among.T).any() or among.diagonal().any():
        raise ValueError(f"Pairs that count must be {square.shape}, symmetric, of different items.")
    pairs, kept = squareform(square, checks=False), squareform(among)
    ranks = rankdata(pairs[kept])
    if (ranks == ranks[:1]).all():
        return None
    pairs = np.zeros_like(pairs)
    pairs[kept] = (ranks - ranks.mean()) / ranks.std()
    return squareform(pairs)


def pair_means(
    weights: FloatArray, among: NDArray[np.bool_] | None = None
) -> Callable[..., FloatArray]:
    """Return a function of a matrix, or of two: the mean over pairs of it, or of their product.

    In each draw `[n_draws]`, pairs i ≠ j weighted by w_i·w_j of the weights `[n_draws, n_items]`;
    if only some count, `among`, matrices must be zero elsewhere. Of the same matrices it is
    computed once: all blocks share the divergences.
    """
    if among is None:
        n_pairs = np.square(weights.sum(axis=1)) - np.square(weights).sum(axis=1)
    else:
        n_pairs = ((weights @ among) * weights).sum(axis=1)
    n_pairs = np.where(n_pairs > 0, n_pairs, np.nan)  # a draw of one item alone has no pair
    known: dict[tuple[int, ...], tuple[tuple[FloatArray, ...], FloatArray]] = {}

    def mean(*matrices: FloatArray) -> FloatArray:
        key = tuple(map(id, matrices))
        if key not in known:
            product = matrices[0] if len(matrices) == 1 else matrices[0] * matrices[1]
            total = np.einsum("di,di->d", weights @ product, weights)
            known[key] = (matrices, total / n_pairs)  # what is kept alive keeps its id
        return known[key][1]

    return mean


def weighted_correlations(
    matrices: Sequence[FloatArray],
    weights: FloatArray,
    pair_mean: Callable[..., FloatArray] | None = None,
) -> FloatArray:
    """Return the correlations among matrices in each draw, ``[n_draws, n_matrices, n_matrices]``.

    Pearson's correlation over the pairs i ≠ j, weighted by w_i·w_j; of ranks it is Spearman's. NaN
    where a matrix is constant in a draw.

    Args:
        matrices: standardised (`rank_matrix`), symmetric ``[n_items, n_items]``.
        weights: ``[n_draws, n_items]``; a row of ones gives the estimate.
        pair_mean: `pair_means` of these weights, where other matrices share it.

    Raises:
        ValueError: weights of another number of items.
    """
    n_items = len(matrices[0])
    if weights.shape[1] != n_items or any(
        matrix.shape != (n_items, n_items) for matrix in matrices
    ):
        raise ValueError(f"Matrices and weights must be of one number of items, here {n_items}.")
    pair_mean = pair_mean or pair_means(weights)
    means = [pair_mean(matrix) for matrix in matrices]
    n = len(matrices)
    covariance = np.empty((len(weights), n, n))
    for i in range(n):
        for j in range(i, n):
            found = pair_mean(matrices[i], matrices[j]) - means[i] * means[j]
            covariance[:, i, j] = covariance[:, j, i] = found
    variances = covariance[:, range(n), range(n)]
    spread = np.sqrt(np.where(variances < 1e-12, np.nan, variances))
    return np.clip(covariance / (spread[:, :, None] * spread[:, None, :]), -1, 1)


def partial_correlation(correlations: ArrayLike) -> FloatArray:
    """Return the correlation of variables 0 and 1 given all the others, over the leading axes.

    Of two variables alone their correlation. Else from the residual covariances given the others,
    c₀₁ / √(c₀₀·c₁₁); with one given variable (r₀₁ − r₀₂·r₁₂) / √((1 − r₀₂²)(1 − r₁₂²)).

    Args:
        correlations: ``[..., n_variables, n_variables]``, as `weighted_correlations` returns them.

    Returns:
        ``[...]``; NaN where a correlation is, and where variable 0 or 1 is determined by the given
        ones (θ given the lens at the last block is such a case).
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
    lost = np.any(variances < _UNDETERMINED, axis=1)
    variances = np.where(np.expand_dims(lost, 1), np.nan, variances)
    result[defined] = np.clip(residual[:, 0, 1] / np.sqrt(variances.prod(axis=1)), -1, 1)
    return result


def mantel_tests(
    firsts: Sequence[ArrayLike],
    second: ArrayLike,
    *,
    n_permutations: int,
    rng: np.random.Generator,
) -> list[float]:
    """Return the two-sided p-values of rank correlations with a matrix, its items shuffled.

    Rows and columns of ``second`` are permuted together, once for all of ``firsts``;
    p = (1 + b) / (1 + N), b the permutations at least as extreme (Mantel 1967; for the 1, Phipson
    and Smyth 2010, doi:10.2202/1544-6115.1585).

    Args:
        firsts: Dissimilarity matrices ``[n_items, n_items]``, one a block, say.
        second: The one whose items are permuted.
        n_permutations: N, 1,000 or more for a p-value that is reported.
        rng: Source of the permutations.

    Raises:
        ValueError: Sizes that differ, a matrix that is constant, as `rank_matrix`.
    """
    ranked = [one for one in map(rank_matrix, (second, *firsts)) if one is not None]
    if len(ranked) <= len(firsts):
        raise ValueError("A dissimilarity matrix is constant: it correlates with nothing.")
    target, *fixed = ranked
    if any(matrix.shape != target.shape for matrix in fixed):
        raise ValueError("All matrices must have one size, that of the second.")
    pairs = np.stack([squareform(matrix) for matrix in fixed])

    def correlations(order: NDArray[np.int64]) -> FloatArray:
        return pairs @ squareform(target[order][:, order], checks=False) / pairs.shape[1]

    null = [correlations(rng.permutation(len(target))) for _ in range(n_permutations)]
    # The same permutation must not lose to itself by rounding.
    extreme = np.abs(null) >= np.abs(correlations(np.arange(len(target)))) - 1e-12
    return ((1 + extreme.sum(axis=0)) / (1 + n_permutations)).tolist()
