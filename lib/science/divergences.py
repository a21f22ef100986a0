"""Divergence of predictions at every block: the Jeffreys divergence of the logit lens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lib.engine.extraction import logit_lens
from lib.engine.models import Decoder
from lib.engine.progress import track

FloatArray = NDArray[np.float64]

_COLUMNS_AT_ONCE = 4096
_ITEMS_AT_ONCE = 400
# Below this a divergence has lost too many digits to the subtraction; see lib.science.metrics.
_CANCELLED = 1e-6


def jeffreys_of_logits(logits: ArrayLike) -> FloatArray:
    """Return the Jeffreys divergence J between the predictions of every two rows of logits, nats.

    Equal to `lib.science.metrics.jeffreys_divergence` of the log-softmax, at about a third of its cost:
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


def lens_divergences(
    decoder: Decoder, states: Sequence[Any], *, description: str | None = None
) -> FloatArray:
    """Return J_ℓ, the Jeffreys divergence of the logit lens at every block, in nats.

    Args:
        decoder: the model, of which the final norm and the unembedding are used.
        states: tensor ``[n_blocks, n_items, d_model]``, as `lib.engine.extraction.extract_residuals`
            returns it.
        description: what a progress display calls this; None shows none.

    Returns:
        ``[n_blocks, n_items, n_items]``; beside it the memory for the logits of one block, or of
        `_ITEMS_AT_ONCE` items.

    Raises:
        ValueError: As `jeffreys_of_logits`.
    """
    blocks = torch.stack(list(states))
    n_items = blocks.shape[1]
    together = blocks.split(max(1, _ITEMS_AT_ONCE // n_items))  # few rows waste a matrix product
    shown = track(together, description) if description else together
    logits = (logit_lens(decoder, part.flatten(0, 1)).split(n_items) for part in shown)
    return np.stack([jeffreys_of_logits(block) for part in logits for block in part])
