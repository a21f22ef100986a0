"""Divergence of predictions at every block: the Jeffreys divergence of the logit lens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.extraction import logit_lens
from lib.models import Decoder
from lib.progress import track

FloatArray = NDArray[np.float64]

_COLUMNS_AT_ONCE = 4096
# Below this a divergence has lost too many digits to the subtraction; see lib.metrics.
_CANCELLED = 1e-6


def jeffreys_of_logits(logits: ArrayLike) -> FloatArray:
    """Return the Jeffreys divergence J between the predictions of every two rows of logits, nats.

    Equal to `lib.metrics.jeffreys_divergence` of the log-softmax, at about a third of its cost:
    J(x, y) = Σ (p_x − p_y)(z_x − z_y) with p = softmax(z), since the two normalisers cancel. So one
    pass over the vocabulary in float64, a few thousand tokens at a time, and no array of the
    logits' size beside them. Each token's mean logit cancels as well and is taken out first.

    Args:
        logits: ``[n_items, d_vocab]``.

    Returns:
        ``[n_items, n_items]``, at least 0, symmetric, 0 on the diagonal and between equal rows.

    Raises:
        ValueError: Fewer than three items, a value that is not finite.
    """
    rows = np.asarray(logits)
    if rows.ndim != 2 or len(rows) < 3:
        raise ValueError(f"logits must be [n_items, d_vocab], 3 items or more; got {rows.shape}.")
    peaks = rows.max(axis=1).astype(np.float64)[:, None]
    if not np.isfinite(rows).all():
        item = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise ValueError(f"logits: item {item} has a NaN or infinite value.")
    cross, totals = np.zeros((len(rows), len(rows))), np.zeros((len(rows), 1))
    for start in range(0, rows.shape[1], _COLUMNS_AT_ONCE):
        part = rows[:, start : start + _COLUMNS_AT_ONCE].astype(np.float64)
        weights = np.exp(part - peaks)
        totals += weights.sum(axis=1, keepdims=True)
        part -= part.mean(axis=0)
        cross += weights @ part.T
    cross /= totals
    own = np.diag(cross)
    result: FloatArray = np.clip(own[:, None] + own[None, :] - (cross + cross.T), 0, None)
    for i, j in zip(*np.nonzero(np.triu(result < _CANCELLED, 1)), strict=True):
        one, other = (rows[k].astype(np.float64) for k in (i, j))
        p, q = np.exp(one - peaks[i]) / totals[i], np.exp(other - peaks[j]) / totals[j]
        result[i, j] = result[j, i] = max(float((p - q) @ (one - other)), 0.0)
    np.fill_diagonal(result, 0.0)
    return result


def lens_divergences(
    decoder: Decoder, states: Sequence[Any], *, description: str | None = None
) -> FloatArray:
    """Return J_ℓ, the Jeffreys divergence of the logit lens at every block, in nats.

    Args:
        decoder: the model, of which the final norm and the unembedding are used.
        states: tensor ``[n_blocks, n_items, d_model]``, as `lib.extraction.extract_residuals`
            returns it.
        description: what a progress display calls this; None shows none.

    Returns:
        ``[n_blocks, n_items, n_items]``; the memory for one block's logits is used beside it.

    Raises:
        ValueError: As `jeffreys_of_logits`.
    """
    blocks = list(states)
    shown = track(blocks, description) if description else blocks
    return np.stack([jeffreys_of_logits(logit_lens(decoder, block).numpy()) for block in shown])
