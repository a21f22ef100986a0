"""Inside the switch: the block and the heads that bring the donor's prediction to the last token.

What is chosen (a block, heads) is chosen on one half of a task's subjects and tested on the other,
with recipients and donors of the same half. The last block counts nowhere. Units are subjects; of
untrained twins, seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.engine.extraction import logit_lens
from lib.engine.parts import find_parts
from lib.engine.sites import ATTENTION, MLP, Head, Site, each_head, patch_heads
from lib.engine.store import recall_sites
from lib.evidence.tasks import Pairs, exchange_pairs
from lib.evidence.transfer import DivergenceFromDonor, Transfer, Trial, divergence
from lib.science.estimate import (
    FEWEST_UNITS,
    Measured,
    Untested,
    generator,
)

CLAIM = "inside-the-switch"
N_DONORS = 6
"""Donors of a subject before halving; those of the other half are left out."""
N_CHOOSING, N_TESTING = 16, 48
"""Most pairs of a task on which parts are chosen and tested."""
N_BLOCKS = 3
"""Blocks, those of most attention transfer, in which a task's heads are looked for."""
FEW = 3
"""Heads that the criteria speak of."""
COUNTS = (1, 2, 3, 5, 8)
"""Numbers of heads that are exchanged together."""


@dataclass(frozen=True, eq=False)
class Halves:
    """Pairs of a task by the half that both their subjects belong to."""

    choosing: Pairs
    testing: Pairs


def halve(trial: Trial | Untested) -> Halves | Untested:
    """Return pairs of two halves of a task's subjects, drawn by the task's name.

    A task with groups (the offsets of month arithmetic) is measured on those that the model
    masters, and not at all without one.
    """
    if isinstance(trial, Untested):
        return trial
    task = trial.task
    grouped = bool((task.prompts["group"] != "").any())
    if grouped and trial.gate is not None:
        return trial.gate
    groups = trial.able_groups if grouped else None
    pairs = exchange_pairs(task, n_donors=N_DONORS, groups=groups)
    first = np.zeros(task.n_units, dtype=bool)
    first[generator("halves", task.name).permutation(task.n_units)[: task.n_units // 2]] = True
    recipient, donor = first[task.unit[pairs.prompts]].T
    halves = Halves(
        thin(pairs.where(recipient & donor), N_CHOOSING),
        thin(pairs.where(~recipient & ~donor), N_TESTING),
    )
    for half in (halves.choosing, halves.testing):
        if len(np.unique(half.unit)) < FEWEST_UNITS:
            return Untested(f"pairs of {len(np.unique(half.unit))} subjects in one half")
    return halves


def thin(pairs: Pairs, most: int) -> Pairs:
    """Return at most so many pairs, of as many subjects as possible, in an order drawn by place."""
    turn = np.zeros(len(pairs), dtype=np.int64)
    order = generator("thin", str(len(pairs))).permutation(len(pairs))
    seen: dict[int, int] = {}
    for row in order:
        unit = int(pairs.unit[row])
        turn[row] = seen[unit] = seen.get(unit, 0) + 1
    kept = np.sort(order[np.argsort(turn[order], kind="stable")][:most])
    return pairs.where(kept)


# --- transfer of sites and heads ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _FromDonor(DivergenceFromDonor):
    """KL(p_y ‖ q) in nats, and the closed set's choice."""

    answer_ids: np.ndarray

    def __call__(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        answers = logits[:, torch.as_tensor(self.answer_ids, device=logits.device)]
        return {**super().__call__(logits, pair), "choice": answers.argmax(-1)}


def _measure(trial: Trial, pairs: Pairs) -> _FromDonor:
    donors, place = np.unique(pairs.prompts[:, 1], return_inverse=True)
    logits = logit_lens(trial.decoder, trial.last_states[torch.as_tensor(donors)])
    return _FromDonor(logits, place, trial.task.answer_ids)


def _transfers(
    trial: Trial,
    pairs: Pairs,
    names: Sequence[str],
    blocks: tuple[int, ...],
    found: Mapping[str, np.ndarray],
) -> dict[str, Transfer]:
    """Return transfers by name from measures `[n_names, n_blocks, n_pairs]`."""
    task = trial.task
    used, place = np.unique(pairs.prompts, return_inverse=True)
    logits = logit_lens(trial.decoder, trial.last_states[torch.as_tensor(used)])
    recipient, donor = place.reshape(-1, 2).T
    before = divergence(logits, donor, recipient)
    target = task.answer_index[pairs.prompts[:, 1]]
    return {
        name: Transfer(
            blocks,
            found["kl_nats"][number],
            before,
            found["choice"][number].astype(np.int64),
            target,
            pairs.unit,
            task.units,
            task.n_units,
        )
        for number, name in enumerate(names)
    }


def exchange_sites(
    trial: Trial,
    pairs: Pairs,
    sites: Mapping[str, Site],
    blocks: Sequence[int] | None = None,
) -> dict[str, Transfer]:
    """Return what exchanging each site at the last token does to the pairs, block by block."""
    sweep = recall_sites(
        trial.decoder,
        trial.task.tokens,
        pairs.prompts,
        sites,
        blocks=blocks,
        measure=_measure(trial, pairs),
        description=f"{trial.task.name}: {', '.join(sites)}",
    )
    return _transfers(trial, pairs, list(sites), sweep.blocks, sweep.measures)


def exchange_heads(
    trial: Trial, pairs: Pairs, groups: Mapping[str, Sequence[Head]]
) -> dict[str, Measured]:
    """Return T of each group of heads, exchanged together at the last token."""
    found = patch_heads(
        trial.decoder,
        trial.task.tokens,
        pairs.prompts,
        groups,
        measure=_measure(trial, pairs),
    )
    together = {name: values[:, None] for name, values in found.items()}
    transfers = _transfers(trial, pairs, list(groups), (0,), together)
    return {name: transfer.estimate().at(0) for name, transfer in transfers.items()}


def total(transfer: Transfer) -> np.ndarray:
    """Return T at each block, of all pairs together, without draws `[n_blocks]`."""
    found: np.ndarray = 1 - transfer.after.sum(axis=1) / transfer.before.sum()
    return found


# --- what is chosen -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chosen:
    """What one half of a task's subjects chose.

    Attributes:
        parts: what exchanging the attention and the MLP of each block did.
        block: the block of most attention transfer, the last one left out.
        heads: of the heads of some blocks, T of each alone, the largest first.
    """

    parts: Mapping[str, Transfer]
    block: int
    heads: Mapping[Head, float]

    def best(self, n: int) -> list[Head]:
        """Return the n heads of most transfer."""
        return list(self.heads)[:n]


def choose(trial: Trial, pairs: Pairs) -> Chosen:
    """Return the block and the heads that carry most on some pairs."""
    parts = exchange_sites(trial, pairs, {"attention": ATTENTION, "mlp": MLP})
    ranked = rank_blocks([total(parts["attention"])])
    heads = transfer_by_head(trial, pairs, ranked[:N_BLOCKS])
    order = sorted(heads, key=lambda head: -heads[head])
    return Chosen(parts, ranked[0], {head: heads[head] for head in order})


def rank_blocks(curves: Sequence[np.ndarray]) -> list[int]:
    """Return blocks by the mean of curves `[n_blocks]`, largest first, without the last block."""
    return [int(block) for block in np.argsort(-np.mean(curves, axis=0)[:-1], kind="stable")]


def transfer_by_head(trial: Trial, pairs: Pairs, blocks: Sequence[int]) -> dict[Head, float]:
    """Return T of each head of some blocks, exchanged alone."""
    wanted = sorted(blocks)
    found = exchange_sites(trial, pairs, each_head(trial.decoder, wanted), wanted)
    return {
        (block, int(name)): float(total(transfer)[place])
        for name, transfer in found.items()
        for place, block in enumerate(wanted)
    }


def choose_over_tasks(
    trials: Mapping[str, Trial], pairs: Mapping[str, Pairs], n: int
) -> list[Head]:
    """Return the n heads of most transfer on the mean over tasks, in blocks chosen likewise."""
    curves = [
        total(exchange_sites(trials[name], own, {"attention": ATTENTION, "mlp": MLP})["attention"])
        for name, own in pairs.items()
    ]
    blocks = rank_blocks(curves)[:N_BLOCKS]
    by_task = [transfer_by_head(trials[name], own, blocks) for name, own in pairs.items()]
    mean = {head: np.mean([one[head] for one in by_task]) for head in by_task[0]}
    return sorted(mean, key=lambda head: -mean[head])[:n]


def random_heads(trial: Trial, beside: Sequence[Head]) -> list[Head]:
    """Return as many other heads of the same blocks, drawn by the task's name."""
    blocks = sorted({block for block, _ in beside})
    others = [
        (block, head)
        for block, part in zip(blocks, find_parts(trial.decoder, blocks), strict=True)
        for head in range(part.n_heads)
        if (block, head) not in beside
    ]
    rng = generator("random heads", trial.task.name, str(len(beside)))
    return [others[place] for place in rng.permutation(len(others))[: len(beside)]]


def test_groups(trial: Trial, chosen: Chosen, held_out: Sequence[Head]) -> dict[str, list[Head]]:
    """Return the groups of heads that are tested: the best ones, random ones, another task's."""
    groups = {f"best {n}": chosen.best(n) for n in COUNTS}
    groups |= {f"random {n}": random_heads(trial, chosen.best(n)) for n in (FEW, COUNTS[-1])}
    return {**groups, "of the seen tasks": list(held_out)}


def test_block(trial: Trial, pairs: Pairs, block: int) -> Measured:
    """Return T of one block's attention output."""
    return (
        exchange_sites(trial, pairs, {"attention": ATTENTION}, [block])["attention"]
        .estimate()
        .at(0)
    )
