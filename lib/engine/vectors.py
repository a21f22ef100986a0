"""Vectors to steer with: held-out centroids, random directions, the way to a token's logit."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lib.engine.edits import norm, unit
from lib.engine.models import Decoder
from lib.engine.structure import device_of


def random_directions(states: Tensor, generator: torch.Generator) -> Tensor:
    """Return states `[..., d_model]` with the given norms and directions drawn uniformly at random.

    As donors of an exchange they are the control for "any state of that size would have done it".
    """
    drawn = torch.randn(states.shape, generator=generator).to(states)
    return unit(drawn) * norm(states)


def held_out_centroids(
    states: Tensor,
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    wanted: Sequence[int] | np.ndarray,
    held_out: Sequence[int] | np.ndarray,
    usable: np.ndarray | None = None,
) -> Tensor:
    """Return, for each case, the mean state of a label outside one group.

    With templates as groups this is leave-one-template-out: a case of template g is steered with
    what the other templates say of its target.

    Args:
        states: `[n_blocks, n_prompts, d_model]`.
        labels: each prompt's label, its answer for one `[n_prompts]`.
        groups: each prompt's group, such as its template `[n_prompts]`.
        wanted: the label of each case `[n_cases]`.
        held_out: the group that each case leaves out `[n_cases]`.
        usable: which prompts may be used `[n_prompts]`, all by default.

    Returns:
        `[n_blocks, n_cases, d_model]`.

    Raises:
        ValueError: a case for which no prompt is left.
    """
    label, group = np.asarray(labels), np.asarray(groups)
    allowed = np.ones(len(label), dtype=bool) if usable is None else np.asarray(usable, dtype=bool)
    keys = list(zip(np.asarray(wanted).tolist(), np.asarray(held_out).tolist(), strict=True))
    means: dict[tuple[int, int], Tensor] = {}
    for key in dict.fromkeys(keys):
        chosen = np.flatnonzero(allowed & (label == key[0]) & (group != key[1]))
        if len(chosen) == 0:
            raise ValueError(
                f"No usable prompt of label {key[0]} lies outside group {key[1]}; leave the case "
                "out."
            )
        means[key] = states[:, chosen].mean(dim=1)
    return torch.stack([means[key] for key in keys], dim=1)


def unembedding_direction(
    decoder: Decoder, states: Tensor, targets: Sequence[int], sources: Sequence[int]
) -> Tensor:
    """Return the direction in which the target's logit gains most on the source's.

    ∇_h [z_target(h) − z_source(h)], z the logit lens: the difference of two rows of the unembedding
    pulled back through the final norm at each state. To first order no other direction of the same
    length does more to that difference at the output.

    Args:
        decoder: the model.
        states: `[n, d_model]`.
        targets: token ids `[n]`.
        sources: token ids `[n]`.

    Raises:
        ValueError: shapes that do not fit, or a target equal to its source.
    """
    if not len(states) == len(targets) == len(sources):
        raise ValueError(
            f"{len(states)} states, {len(targets)} targets and {len(sources)} sources; give one "
            "target and one source for each state."
        )
    rows = [torch.as_tensor(np.asarray(ids)).tolist() for ids in (targets, sources)]
    if same := [token for token, other in zip(*rows, strict=True) if token == other]:
        raise ValueError(f"Token {same[0]} is both target and source; nothing can be gained.")
    tokens = sorted({*rows[0], *rows[1]})
    target, source = (
        torch.nn.functional.one_hot(torch.tensor([tokens.index(t) for t in ids]), len(tokens))
        for ids in rows
    )
    with torch.enable_grad():
        free = states.detach().clone().to(device_of(decoder.unembedding), decoder.dtype)
        logits = decoder.unembed(decoder.final_norm(free.requires_grad_(True)), tokens)
        gain = (logits * (target - source).to(logits)).sum()
        (gradient,) = torch.autograd.grad(gain, free)
    return gradient.to(states)
