"""Geometry of states and divergence of predictions, as dissimilarity matrices and summaries.

All functions take arrays and compute in float64. ``states`` is ``[n_items, d_model]``: the residual
stream of one block, one row an item; a caller with all blocks loops over them. Every dissimilarity
matrix is exactly symmetric with an exactly zero diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist, squareform

FloatArray = NDArray[np.float64]

# Below this, 1 - |cos| or a divergence has lost too many digits to the subtraction and is
# computed again from the difference of the two rows.
_CANCELLED = 1e-6
_ROWS_AT_ONCE = 2048
_COLUMNS_AT_ONCE = 8192


def _finite_rows(values: ArrayLike, name: str, *, minimum: int = 1) -> FloatArray:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(
            f"{name} must be two-dimensional, one row an item; got shape {rows.shape}."
        )
    if len(rows) < minimum:
        raise ValueError(f"{name} must have at least {minimum} items; got {len(rows)}.")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name}: item {int(np.argmin(finite))} has a NaN or infinite value.")
    return rows


def _checked_norms(states: FloatArray, name: str = "states") -> FloatArray:
    norms: FloatArray = np.linalg.norm(states, axis=1)
    if not norms.all():
        item = int(np.argmin(norms))
        raise ValueError(f"{name}: item {item} has norm 0, so it has no direction; leave it out.")
    return norms


def _directions(states: FloatArray, name: str = "states") -> FloatArray:
    return states / _checked_norms(states, name)[:, None]


def angles(states: ArrayLike) -> FloatArray:
    """Return the angle θ between the directions of every two states.

    θ(x, y) = 2·atan2(|u − v|, |u + v|) with u = x/|x|, v = y/|y|: equal to arccos(u·v), and without
    its loss of digits near 0 and π (Kahan 2006, "How futile are mindless assessments of roundoff",
    section 12). Taken from the Gram matrix; pairs within about a milliradian of 0 or π are computed
    again from u − v and u + v, so identical states are at exactly 0.

    Args:
        states: ``[n_items, d_model]``.

    Returns:
        ``[n_items, n_items]``, radians in [0, π].

    Raises:
        ValueError: Fewer than three items, a zero state, a value that is not finite.
    """
    directions = _directions(_finite_rows(states, "states", minimum=3))
    cosines = directions @ directions.T
    cosines = (cosines + cosines.T) / 2
    result = 2 * np.arctan2(
        np.sqrt(np.clip(2 - 2 * cosines, 0, None)), np.sqrt(np.clip(2 + 2 * cosines, 0, None))
    )
    rows, columns = np.nonzero(np.triu(1 - np.abs(cosines) < _CANCELLED, 1))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        i, j = rows[start : start + _ROWS_AT_ONCE], columns[start : start + _ROWS_AT_ONCE]
        result[i, j] = result[j, i] = _angle_between(directions[i], directions[j])
    np.fill_diagonal(result, 0.0)
    return result


def _angle_between(u: FloatArray, v: FloatArray) -> FloatArray:
    """Row-wise angle of unit vectors, accurate at every angle."""
    result: FloatArray = 2 * np.arctan2(
        np.linalg.norm(u - v, axis=1), np.linalg.norm(u + v, axis=1)
    )
    return result


def distances(states: ArrayLike) -> FloatArray:
    """Return the Euclidean distance d between every two states, ``[n_items, n_items]``.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    result: FloatArray = squareform(pdist(_finite_rows(states, "states", minimum=3)))
    return result


def log_norm_differences(states: ArrayLike) -> FloatArray:
    """Return |log r_x − log r_y| for every two states, r the L2 norm, ``[n_items, n_items]``.

    Raises:
        ValueError: Fewer than three items, a zero state, a value that is not finite.
    """
    logs = np.log(_checked_norms(_finite_rows(states, "states", minimum=3)))
    result: FloatArray = np.abs(logs[:, None] - logs[None, :])
    return result


def category_differences(labels: Sequence[object] | NDArray[np.generic]) -> FloatArray:
    """Return 0 where two items share a label and 1 where they do not, ``[n_items, n_items]``.

    The dissimilarity matrix of a model that knows the label (subject, answer, template) only.

    Raises:
        ValueError: Fewer than three items.
    """
    if len(labels) < 3:
        raise ValueError(f"labels must have at least 3 items; got {len(labels)}.")
    codes = np.unique(np.asarray([str(label) for label in labels]), return_inverse=True)[1]
    result: FloatArray = (codes[:, None] != codes[None, :]).astype(np.float64)
    return result


def token_set_distances(token_lists: Sequence[Sequence[int]]) -> FloatArray:
    """Return the Jaccard distance of the token sets of every two items, ``[n_items, n_items]``.

    1 − |A ∩ B| / |A ∪ B|, in [0, 1]: how little two texts overlap in their words.

    Raises:
        ValueError: Fewer than three items, an item without tokens.
    """
    if len(token_lists) < 3:
        raise ValueError(f"token_lists must have at least 3 items; got {len(token_lists)}.")
    sets = [set(tokens) for tokens in token_lists]
    if not all(sets):
        raise ValueError(f"token_lists: item {[bool(s) for s in sets].index(False)} has no token.")
    column = {token: k for k, token in enumerate(sorted(set().union(*sets)))}
    present = np.zeros((len(sets), len(column)))
    for row, tokens in enumerate(sets):
        present[row, [column[token] for token in tokens]] = 1
    shared = present @ present.T
    sizes = np.diag(shared)
    result: FloatArray = 1 - shared / (sizes[:, None] + sizes[None, :] - shared)
    return result


def log_probabilities(logits: ArrayLike) -> FloatArray:
    """Return the log-softmax of each row in nats, ``[n_items, d_vocab]``, finite for finite logits.

    Raises:
        ValueError: A logit that is not finite.
    """
    rows = _finite_rows(logits, "logits")
    shifted: FloatArray = rows - rows.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def jeffreys_divergence(log_p: ArrayLike) -> FloatArray:
    """Return the Jeffreys divergence J between every two distributions, in nats.

    J(p, q) = KL(p‖q) + KL(q‖p) = Σ (p − q)(log p − log q): the sum of both divergences, not half of
    it (Jeffreys 1946). One matrix product over all pairs; the column means of log p, which cancel
    in J, are taken out first so that little is left to cancel. Pairs that come out next to 0 are
    computed again from the difference of their rows: equal rows are at exactly 0.

    Args:
        log_p: ``[n_items, d_vocab]``, natural logarithms of probabilities (`log_probabilities`).

    Returns:
        ``[n_items, n_items]``, nats, at least 0. Cost is quadratic in items, linear in vocabulary.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    logs = _finite_rows(log_p, "log_p", minimum=3)
    cross = np.zeros((len(logs), len(logs)))
    for start in range(0, logs.shape[1], _COLUMNS_AT_ONCE):
        part = logs[:, start : start + _COLUMNS_AT_ONCE]
        cross += np.exp(part) @ (part - part.mean(axis=0)).T
    own = np.diag(cross)
    result = np.clip(own[:, None] + own[None, :] - (cross + cross.T), 0, None)
    for i, j in zip(*np.nonzero(np.triu(result < _CANCELLED, 1)), strict=True):
        exact = ((np.exp(logs[i]) - np.exp(logs[j])) * (logs[i] - logs[j])).sum()
        result[i, j] = result[j, i] = exact
    np.fill_diagonal(result, 0.0)
    return result


def kl_divergence(log_p: ArrayLike, log_q: ArrayLike) -> FloatArray:
    """Return KL(p‖q) = Σ p (log p − log q) of each row in nats, ``[n_items]``, at least 0.

    Raises:
        ValueError: Shapes that differ, a value that is not finite.
    """
    p, q = _finite_rows(log_p, "log_p"), _finite_rows(log_q, "log_q")
    if p.shape != q.shape:
        raise ValueError(f"log_p and log_q must have one shape; got {p.shape} and {q.shape}.")
    result: FloatArray = np.clip((np.exp(p) * (p - q)).sum(axis=1), 0, None)
    return result


def entropy(log_p: ArrayLike) -> FloatArray:
    """Return the entropy −Σ p log p of each row in nats, ``[n_items]``, at least 0.

    Raises:
        ValueError: A value that is not finite.
    """
    logs = _finite_rows(log_p, "log_p")
    result: FloatArray = np.clip(-(np.exp(logs) * logs).sum(axis=1), 0, None)
    return result


def upper_triangle(matrix: ArrayLike) -> FloatArray:
    """Return the n(n − 1)/2 entries above the diagonal, row by row, as SciPy's ``squareform`` does.

    Raises:
        ValueError: A matrix that is not square.
    """
    square = np.asarray(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1]:
        raise ValueError(f"matrix must be square; got shape {square.shape}.")
    return square[np.triu_indices(len(square), 1)]


def mean_cosine(states: ArrayLike) -> float:
    """Return the mean cosine of two different states, in [−1, 1]; near 1: a narrow cone.

    (|Σ u|² − n) / (n(n − 1)), u the directions (Ethayarajh 2019, arXiv:1909.00512, section 3.2).

    Raises:
        ValueError: Fewer than three items, a zero state, a value that is not finite.
    """
    directions = _directions(_finite_rows(states, "states", minimum=3))
    n_items = len(directions)
    total = float(np.square(directions.sum(axis=0)).sum())
    return (total - n_items) / (n_items * (n_items - 1))


def angular_step(states: ArrayLike, next_states: ArrayLike) -> FloatArray:
    """Return by how much each item's direction turns between two blocks, radians ``[n_items]``.

    Raises:
        ValueError: Shapes that differ, a zero state, a value that is not finite.
    """
    before, after = _finite_rows(states, "states"), _finite_rows(next_states, "next_states")
    if before.shape != after.shape:
        raise ValueError(
            f"states and next_states must have one shape; got {before.shape} and {after.shape}."
        )
    return _angle_between(_directions(before), _directions(after, "next_states"))


def effective_rank(states: ArrayLike) -> float:
    """Return how many directions the centred states spread over, from 1 to min(n − 1, d_model).

    The exponential of the entropy of the normalised singular values (Roy and Vetterli 2007, "The
    effective rank", definition 1).

    Raises:
        ValueError: Fewer than three items, a value that is not finite, states that are all equal.
    """
    values = np.linalg.svd(centred(states), compute_uv=False)
    if values[0] == 0:
        raise ValueError("states are all equal: their effective rank is undefined.")
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def intrinsic_dimension(states: ArrayLike, *, discard: float = 0.1) -> float:
    """Return the TwoNN estimate of the dimension of the surface that the states lie on.

    With μ the ratio of the distances to the second and first neighbour, and F its empirical
    distribution (i / n at the i-th smallest), the slope through the origin of −log(1 − F) on
    log μ (Facco et al. 2017, doi:10.1038/s41598-017-11873-y), the largest ratios left out.

    Args:
        states: ``[n_items, d_model]``, no two of them equal.
        discard: Share of the items, those with the largest ratios, left out of the fit; one item
            at least has to be.

    Raises:
        ValueError: Fewer than three items, two equal states, a value that is not finite, neighbours
            all equally far.
    """
    matrix = distances(states)
    np.fill_diagonal(matrix, np.inf)
    nearest = np.partition(matrix, 1, axis=1)[:, :2]
    if not nearest[:, 0].all():
        i = int(np.argmin(nearest[:, 0]))
        raise ValueError(
            f"states: items {i} and {int(np.argmin(matrix[i]))} are equal; "
            "the intrinsic dimension needs distinct states, so leave one out."
        )
    n_kept = int(len(matrix) * (1 - discard))
    if not 2 <= n_kept < len(matrix):
        raise ValueError(
            f"discard must leave out 1 or more of the {len(matrix)} items, keep 2; got {discard}."
        )
    log_ratios = np.log(np.sort(nearest[:, 1] / nearest[:, 0])[:n_kept])
    if not log_ratios.any():
        raise ValueError("states: first and second neighbours are equally far for every item.")
    heights = -np.log1p(-np.arange(1, n_kept + 1) / len(matrix))
    return float((log_ratios @ heights) / (log_ratios @ log_ratios))


def neighbourhood_overlap(first: ArrayLike, second: ArrayLike, *, k: int) -> FloatArray:
    """Return the share of each item's k nearest neighbours that two dissimilarity matrices share.

    Chance is k / (n_items − 1). Ties go to the item that comes first.

    Args:
        first: ``[n_items, n_items]`` dissimilarity matrix.
        second: The same items in the same order.
        k: Neighbours, from 1 to n_items − 2.

    Returns:
        ``[n_items]``, in [0, 1].

    Raises:
        ValueError: Shapes that differ, ``k`` out of range.
    """
    matrices = [_finite_rows(first, "first", minimum=3), _finite_rows(second, "second", minimum=3)]
    n_items = len(matrices[0])
    if any(matrix.shape != (n_items, n_items) for matrix in matrices):
        raise ValueError(
            f"both matrices must be square and of one size; got {matrices[0].shape} and "
            f"{matrices[1].shape}."
        )
    if not 1 <= k <= n_items - 2:
        raise ValueError(f"k must be from 1 to n_items - 2 = {n_items - 2}; got {k}.")
    members = np.zeros((2, n_items, n_items), dtype=bool)
    for member, matrix in zip(members, matrices, strict=True):
        others = matrix.copy()
        np.fill_diagonal(others, np.inf)
        np.put_along_axis(member, np.argsort(others, axis=1, kind="stable")[:, :k], True, axis=1)
    overlap: FloatArray = (members[0] & members[1]).sum(axis=1) / k
    return overlap


def centred(states: ArrayLike) -> FloatArray:
    """Return the states minus their mean over items, ``[n_items, d_model]``.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    rows = _finite_rows(states, "states", minimum=3)
    result: FloatArray = rows - rows.mean(axis=0)
    return result


def without_components(states: ArrayLike, k: int) -> FloatArray:
    """Return the centred states with their k first principal components projected out.

    Mu and Viswanath 2018, arXiv:1702.01417, algorithm 1.

    Raises:
        ValueError: Fewer than three items, a value that is not finite, ``k`` not below the rank.
    """
    rows = centred(states)
    _, values, components = np.linalg.svd(rows, full_matrices=False)
    rank = int((values > values[0] * max(rows.shape) * np.finfo(np.float64).eps).sum())
    if rank == 0:
        raise ValueError("states are all equal: they have no principal components.")
    if not 0 <= k < rank:
        raise ValueError(f"k must be from 0 to {rank - 1}, the rank of the states less 1; got {k}.")
    rows -= (rows @ components[:k].T) @ components[:k]
    return rows


def outlier_dimensions(states: ArrayLike, *, factor: float = 5.0) -> NDArray[np.int64]:
    """Return the dimensions that dwarf the others, in ascending order.

    Rule of this project: a dimension whose root mean square over the items is more than ``factor``
    times that of the median dimension (the median, since the outliers themselves move a mean and a
    standard deviation). On such dimensions see Timkey and van Schijndel 2021, arXiv:2109.04404.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    rows = _finite_rows(states, "states", minimum=3)
    sizes = np.sqrt(np.square(rows).mean(axis=0))
    return np.flatnonzero(sizes > factor * np.median(sizes)).astype(np.int64)


def without_outlier_dimensions(states: ArrayLike, *, factor: float = 5.0) -> FloatArray:
    """Return the states without their `outlier_dimensions`, ``[n_items, fewer]``.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    rows = _finite_rows(states, "states", minimum=3)
    return np.delete(rows, outlier_dimensions(rows, factor=factor), axis=1)
