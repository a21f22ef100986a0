"""Geometry of states and divergence of predictions, as dissimilarity matrices.

All functions compute in float64. ``states`` is ``[n_items, d_model]``, one row an item; a
dissimilarity matrix ``[n_items, n_items]`` is exactly symmetric with an exactly zero diagonal.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist, squareform

FloatArray = NDArray[np.float64]

# Below this, 1 - |cos| or a divergence has lost too many digits to the subtraction and is
# computed again from the difference of the two rows.
_CANCELLED = 1e-6
_ROWS_AT_ONCE = 2048
_COLUMNS_AT_ONCE = 4096


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


def _checked_norms(states: FloatArray) -> FloatArray:
    norms: FloatArray = np.linalg.norm(states, axis=1)
    if not norms.all():
        item = int(np.argmin(norms))
        raise ValueError(f"states: item {item} has norm 0, so it has no direction; leave it out.")
    return norms


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
    finite = _finite_rows(states, "states", minimum=3)
    directions = finite / _checked_norms(finite)[:, None]
    cosines = directions @ directions.T
    cosines = (cosines + cosines.T) / 2
    result = 2 * np.arctan2(
        np.sqrt(np.clip(2 - 2 * cosines, 0, None)), np.sqrt(np.clip(2 + 2 * cosines, 0, None))
    )
    rows, columns = np.nonzero(np.triu(1 - np.abs(cosines) < _CANCELLED, 1))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        i, j = rows[start : start + _ROWS_AT_ONCE], columns[start : start + _ROWS_AT_ONCE]
        u, v = directions[i], directions[j]
        angle = 2 * np.arctan2(np.linalg.norm(u - v, axis=1), np.linalg.norm(u + v, axis=1))
        result[i, j] = result[j, i] = angle
    np.fill_diagonal(result, 0.0)
    return result


def distances(states: ArrayLike) -> FloatArray:
    """Return the Euclidean distance d between every two states, ``[n_items, n_items]``.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    return squareform(pdist(_finite_rows(states, "states", minimum=3)))


def log_norm_differences(states: ArrayLike) -> FloatArray:
    """Return |log r_x − log r_y| for every two states, r the L2 norm, ``[n_items, n_items]``.

    Raises:
        ValueError: Fewer than three items, a zero state, a value that is not finite.
    """
    logs = np.log(_checked_norms(_finite_rows(states, "states", minimum=3)))
    return np.abs(logs[:, None] - logs[None, :])


def jeffreys_divergence(logits: ArrayLike) -> FloatArray:
    """Return the Jeffreys divergence J between the predictions of every two rows of logits, nats.

    The sum of both divergences, not half of it (Jeffreys 1946): J(x, y) = KL(p_x‖p_y) + KL(p_y‖p_x)
    = Σ (p_x − p_y)(z_x − z_y) with p = softmax(z), since the normalisers cancel. So one pass over
    the vocabulary in float64, a few thousand tokens at a time, and no array of the logits' size
    beside them. Each token's mean logit cancels as well and is taken out first.

    Args:
        logits: ``[n_items, d_vocab]``.

    Returns:
        ``[n_items, n_items]``, at least 0, symmetric, 0 on the diagonal and between equal rows.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    rows = torch.as_tensor(logits)
    if rows.dim() != 2 or len(rows) < 3:
        raise ValueError(
            f"logits must be [n_items, d_vocab], 3 items or more; got {tuple(rows.shape)}."
        )
    if not (finite := torch.isfinite(rows).all(dim=1)).all():
        item = int(finite.int().argmin())
        raise ValueError(f"logits: item {item} has a NaN or infinite value.")
    peaks = rows.amax(dim=1, keepdim=True).double()
    cross = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    totals = torch.zeros(len(rows), 1, dtype=torch.float64)
    for part in rows.split(_COLUMNS_AT_ONCE, dim=1):
        values = part.to(torch.float64, copy=True)  # what was given stays as it is
        weights = (values - peaks).exp_()
        totals += weights.sum(dim=1, keepdim=True)
        values -= values.mean(dim=0)
        cross.addmm_(weights, values.T)
    cross /= totals
    own = cross.diagonal()
    result: FloatArray = (own[:, None] + own[None, :] - (cross + cross.T)).clamp_(min=0).numpy()
    for i, j in zip(*np.nonzero(np.triu(result < _CANCELLED, 1)), strict=True):
        one, other = (rows[int(k)].double() for k in (i, j))
        p, q = ((one - peaks[i]).exp() / totals[i], (other - peaks[j]).exp() / totals[j])
        result[i, j] = result[j, i] = max(float((p - q) @ (one - other)), 0.0)
    np.fill_diagonal(result, 0.0)
    return result
