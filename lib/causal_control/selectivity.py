"""Selectivity: what steering does to everything but the source's and the target's answer."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lib.engine.recipes import by_recipe
from lib.engine.sweeps import Measure

ROWS_AT_ONCE = 64


@by_recipe
def rest_measure(
    clean_logits: Tensor,
    recipients: np.ndarray,
    ends: np.ndarray,
    answer_ids: np.ndarray,
) -> Measure:
    """Return a measure of what an edit does to the rest of the distribution.

    p is the recipient's unedited distribution, q the edited one, s and t the tokens of the source's
    and the target's answer:

    - `rest_kl_nats`: KL(p̃‖q̃), both without s and t and renormalised; at least 0.
    - `others_change`: Σ |q_a − p_a| over the other answers of the closed set, in probability.
    - `target_probability`: q_t.

    Equal to `rest_kl_nats` of `lib.engine.readouts`, with one exponential a token where that takes six.

    Args:
        clean_logits: the prompts' unedited logits `[n_prompts, d_vocab]`.
        recipients: each pair's recipient among the prompts `[n_pairs]`; a row of the sweep belongs
            to pair `row % n_pairs`.
        ends: source and target of each pair, as indices into the answers `[n_pairs, 2]`.
        answer_ids: tokens of the closed set `[n_answers]`.
    """
    log_p = torch.log_softmax(clean_logits.double(), dim=-1)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(-1)
    recipient = torch.as_tensor(np.asarray(recipients))
    both = torch.as_tensor(np.asarray(answer_ids)[np.asarray(ends)])
    answers = torch.as_tensor(np.asarray(answer_ids))
    n_pairs = len(recipient)
    is_other = torch.ones(n_pairs, len(answers), dtype=torch.bool)
    is_other[torch.arange(n_pairs)[:, None], torch.as_tensor(np.asarray(ends))] = False
    own = recipient[:, None]
    left = 1 - p[own, both].sum(1)
    cross = negative_entropy[recipient] - (p[own, both] * log_p[own, both]).sum(1)

    def measure(logits: Tensor, row: Tensor) -> Mapping[str, Tensor]:
        parts = [
            read(logits[part].double().cpu(), row[part].cpu() % n_pairs)
            for part in torch.arange(len(row)).split(ROWS_AT_ONCE)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def read(z: Tensor, pair: Tensor) -> dict[str, Tensor]:
        top = z.amax(-1, keepdim=True)
        ends_z = z.gather(1, both[pair])
        mass = torch.exp(z - top)
        total = mass.sum(-1)
        ends_mass = torch.exp(ends_z - top)
        rest = (total - ends_mass.sum(1)).clamp(min=torch.finfo(z.dtype).tiny)
        expected = (p[recipient[pair]] * z).sum(-1)
        expected = expected - (p[own[pair], both[pair]] * ends_z).sum(1)
        kept = left[pair].clamp(min=torch.finfo(z.dtype).tiny)
        kl = (cross[pair] - expected) / kept - kept.log() + rest.log() + top[:, 0]
        others = mass[:, answers] / total[:, None] - p[own[pair], answers]
        return {
            "rest_kl_nats": kl.clamp(min=0),
            "others_change": (others.abs() * is_other[pair]).sum(1),
            "target_probability": ends_mass[:, 1] / total,
        }

    return measure
