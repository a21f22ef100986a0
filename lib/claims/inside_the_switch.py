"""Inside the switch: the block and the heads that bring the donor's prediction to the last token.

What is chosen (a block, heads) is chosen on one half of a task's subjects and tested on the other,
with recipients and donors of the same half. The last block counts nowhere. Units are subjects; of
untrained twins, seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import pandas as pd
import torch

from lib.engine.extraction import logit_lens
from lib.engine.models import Decoder
from lib.engine.parts import find_parts
from lib.engine.readouts import WithChoice
from lib.engine.sites import ATTENTION, MLP, Head, Site, each_head, head_outputs, patch_heads
from lib.engine.store import recall_sweep
from lib.evidence.by_task import each
from lib.evidence.criteria import is_held_out
from lib.evidence.tasks import Pairs, Task
from lib.evidence.transfer import (
    Transfer,
    Trial,
    choose_pairs,
    divergence_before,
    from_donors,
    needed_prompts,
    read_tasks,
)
from lib.science.estimate import (
    FEWEST_UNITS,
    Estimate,
    Measured,
    Untested,
    generator,
    is_own,
    mean_over_units,
    means_by_unit,
    ratio_of_sums,
    sums_by_unit,
)

CLAIM = "inside-the-switch"
N_DONORS = 6
"""Donors of a subject before halving; those of the other half are left out."""
N_CHOOSING, N_TESTING = 12, 48
"""Most pairs of a task on which parts are chosen and tested."""
N_BLOCKS = 5
"""Blocks, those of most attention transfer, in which a task's heads are looked for."""
FEW = 3
"""Heads that the criteria speak of."""
COUNTS = (1, 2, 3, 5, 8)
"""Numbers of heads that are exchanged together."""
TWIN_PAIRS = 6
"""Pairs of each half that twins are measured on: a seed is one number."""
TWIN_HELD_OUT = 1
"""Held-out tasks that twins are measured on, beside the seen ones."""
PARTS: Mapping[str, Site] = {"attention": ATTENTION, "mlp": MLP}


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
    task, pairs = trial.task, choose_pairs(trial, n_donors=N_DONORS)
    if isinstance(pairs, Untested):
        return pairs
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


def _measure(trial: Trial, pairs: Pairs) -> tuple[WithChoice, np.ndarray]:
    """Return the measure of edits of the pairs, and KL(p_y ‖ p_x) before them, nats `[n_pairs]`."""
    used, place = np.unique(pairs.prompts, return_inverse=True)
    recipients, donors = place.reshape(-1, 2).T
    logits = trial.logits_after(used)
    known = from_donors(logits, donors)
    return WithChoice(known, trial.task.answer_ids), divergence_before(known, logits, recipients)


def _transfers(
    trial: Trial,
    pairs: Pairs,
    clean: np.ndarray,
    names: Sequence[str],
    blocks: tuple[int, ...],
    found: Mapping[str, np.ndarray],
) -> dict[str, Transfer]:
    """Return transfers by name from measures `[n_names, n_blocks, n_pairs]`."""
    task = trial.task
    target = task.answer_index[pairs.prompts[:, 1]]
    return {
        name: Transfer(
            blocks,
            found["kl_nats"][number],
            clean,
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
    measure, clean = _measure(trial, pairs)
    sweep = recall_sweep(
        trial.decoder,
        trial.task.tokens,
        pairs.prompts,
        sites,
        blocks=blocks,
        measure=measure,
        forests=trial.forests,
        description=f"{trial.task.name}: {', '.join(sites)}",
    )
    return _transfers(trial, pairs, clean, list(sites), sweep.blocks, sweep.measures)


def exchange_heads(
    trial: Trial, pairs: Pairs, groups: Mapping[str, Sequence[Head]]
) -> dict[str, Measured]:
    """Return T of each group of heads, exchanged together at the last token."""
    measure, clean = _measure(trial, pairs)
    found = patch_heads(
        trial.decoder,
        trial.task.tokens,
        pairs.prompts,
        groups,
        measure=measure,
        forests=trial.forests,
    )
    together = {name: values[:, None] for name, values in found.items()}
    transfers = _transfers(trial, pairs, clean, list(groups), (0,), together)
    return {name: transfer.estimate().at(0) for name, transfer in transfers.items()}


def _apart(trial: Trial, pairs: Pairs) -> Trial:
    """Return the trial if its forests hold the pairs' prompts, else with a list of their own."""
    there = {prompt for forest in trial.forests for prompt in forest.prompts}
    used = np.unique(pairs.prompts)
    kept = all(tuple(trial.task.tokens[row]) in there for row in used)
    return trial if kept else replace(trial, forests=[])


def total(transfer: Transfer) -> np.ndarray:
    """Return T at each block, of all pairs together, without draws `[n_blocks]`."""
    return 1 - transfer.after.sum(axis=1) / transfer.before.sum()


# --- what is chosen -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Opened:
    """A task whose switch was opened, and what the choosing half of its subjects chose.

    Attributes:
        trial: the task as the model reads it.
        halves: pairs of each half.
        parts: what exchanging the attention's output, or the MLP's, of each block did.
        block: the block of most attention transfer, the last one left out.
        heads: of the heads of some blocks, T of each alone, the largest first.
    """

    trial: Trial
    halves: Halves
    parts: Mapping[str, Transfer]
    block: int
    heads: Mapping[Head, float]

    def best(self, n: int) -> list[Head]:
        """Return the n heads of most transfer."""
        return list(self.heads)[:n]


def open_switch(trial: Trial, halves: Halves, parts: Mapping[str, Site] = PARTS) -> Opened:
    """Return what the choosing half chose: the block and the heads that carry most."""
    pairs = halves.choosing
    alone = _apart(trial, pairs)
    found = exchange_sites(alone, pairs, parts)
    ranked = rank_blocks([total(found["attention"])])
    heads = transfer_by_head(alone, pairs, ranked[:N_BLOCKS])
    order = sorted(heads, key=lambda head: -heads[head])
    return Opened(trial, halves, found, ranked[0], {head: heads[head] for head in order})


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


# --- what is tested -------------------------------------------------------------------------------


def heads_alone(opened: Opened, blocks: Sequence[int]) -> dict[Head, float]:
    """Return T of each head of some blocks on the choosing half, those known included."""
    known = dict(opened.heads)
    missing = set(blocks) - {block for block, _ in known}
    if missing:
        known |= transfer_by_head(opened.trial, opened.halves.choosing, sorted(missing))
    return {head: value for head, value in known.items() if head[0] in set(blocks)}


def map_heads(trial: Trial, pairs: Pairs) -> np.ndarray:
    """Return T of each head of each block, exchanged alone `[n_heads, n_blocks]`."""
    found = exchange_sites(trial, pairs, each_head(trial.decoder))
    return np.stack([total(transfer) for transfer in found.values()])


def heads_of_seen_tasks(opened: Mapping[str, Opened]) -> list[Head] | Untested:
    """Return three heads, those of most transfer on the mean over the seen tasks."""
    seen = {name: one for name, one in opened.items() if not is_held_out(name)}
    if not seen:
        return Untested("none of the tasks on which heads are chosen was measured")
    blocks = rank_blocks([total(one.parts["attention"]) for one in seen.values()])[:N_BLOCKS]
    by_task = [heads_alone(one, blocks) for one in seen.values()]
    mean = {head: np.mean([found[head] for found in by_task]) for head in by_task[0]}
    return sorted(mean, key=lambda head: -mean[head])[:FEW]


def random_heads(opened: Opened, n: int) -> list[Head]:
    """Return n of the heads that were looked at but the n best, drawn by the task's name."""
    others = list(opened.heads)[n:]
    order = generator("random heads", opened.trial.task.name).permutation(len(others))
    return [others[place] for place in order[:n]]


def every_head(decoder: Decoder, blocks: Sequence[int]) -> list[Head]:
    """Return all heads of some blocks."""
    parts = zip(blocks, find_parts(decoder, blocks), strict=True)
    return [(block, head) for block, part in parts for head in range(part.n_heads)]


def transfer_on_testing_half(
    opened: Opened, elsewhere: Sequence[Head] | Untested
) -> dict[str, Measured]:
    """Return T on the testing half, by what is exchanged.

    `attention`: the chosen block's attention output. `best n`: the n chosen heads. `random 3`:
    others of the same five blocks. `elsewhere`: three heads that other tasks chose.
    """
    pairs = opened.halves.testing
    trial = _apart(opened.trial, pairs)
    groups = {f"best {n}": opened.best(n) for n in COUNTS}
    groups[f"random {FEW}"] = random_heads(opened, FEW)
    if not isinstance(elsewhere, Untested):
        groups["elsewhere"] = list(elsewhere)
    groups["attention"] = every_head(trial.decoder, [opened.block])
    found = exchange_heads(trial, pairs, groups)
    return {"elsewhere": elsewhere, **found} if isinstance(elsewhere, Untested) else found


def as_table(opened: Opened, tested: Mapping[str, Measured]) -> pd.DataFrame:
    """Return what was exchanged on one task, where, and T, as it is recorded of a larger model.

    Columns `model`, `date`, `task`, `offsets` (the groups that the model masters), `exchanged`,
    `where` (a block, or heads as block.head), `estimate`, `low`, `high`, `n`.
    """
    groups = {f"best {n}": opened.best(n) for n in COUNTS}
    groups[f"random {FEW}"] = random_heads(opened, FEW)
    places = {name: " ".join(f"{b}.{h}" for b, h in heads) for name, heads in groups.items()}
    rows = []
    for name, where in {"attention": str(opened.block), **places}.items():
        one = tested[name]
        if isinstance(one, Estimate):
            rows.append((name, where, float(one), *map(float, one.interval()), one.n_units))
    table = pd.DataFrame(rows, columns=["exchanged", "where", "estimate", "low", "high", "n"])
    return table.assign(
        model=opened.trial.decoder.name,
        date=pd.Timestamp.today().date().isoformat(),
        task=opened.trial.task.name,
        offsets=" ".join(opened.trial.able_groups),
    )


def statistics(
    tested: Mapping[str, Mapping[str, Measured] | Untested],
) -> dict[str, dict[str, Measured]]:
    """Return the claim's statistics by task; heads of the seen tasks only on the held-out ones."""

    def of(what: str) -> dict[str, Measured]:
        return each(tested, itemgetter(what))

    return {
        "attention_transfer": of("attention"),
        "three_heads": of(f"best {FEW}"),
        "three_heads_held_out": {
            name: one for name, one in of("elsewhere").items() if is_held_out(name)
        },
    }


def twin_tasks(names: Collection[str]) -> list[str]:
    """Return the book's tasks that twins are measured on: the seen ones and some held out."""
    held_out = [name for name in names if is_held_out(name) and not is_own(name)]
    held_out.sort(key=lambda name: generator("twin tasks", name).random())
    return [name for name in names if not is_held_out(name)] + held_out[:TWIN_HELD_OUT]


def measure_twin(
    twin: Decoder, halves: Mapping[str, Halves], tasks: Mapping[str, Task]
) -> dict[str, dict[str, Measured]]:
    """Return the statistics of an untrained twin: the same steps, on few pairs of some tasks."""
    few: dict[str, Halves] = {}
    needed: dict[str, Task | Untested] = {}
    for name, own in halves.items():
        choosing, testing = (thin(half, TWIN_PAIRS) for half in (own.choosing, own.testing))
        needed[name], both = needed_prompts(tasks[name], choosing, testing)
        few[name] = Halves(*both)
    read = read_tasks(twin, needed)
    opened = {
        name: open_switch(trial, few[name], {"attention": ATTENTION})
        for name, trial in read.items()
        if isinstance(trial, Trial)
    }
    elsewhere = heads_of_seen_tasks(opened)
    return statistics(
        {name: transfer_on_testing_half(one, elsewhere) for name, one in opened.items()}
    )


# --- what is lost, read, written ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KnockOut:
    """What is lost of the recipients' own predictions where heads do not see the subject.

    Attributes:
        lost: KL(p_x ‖ p_blind) in nats `[n_groups, n_prompts]`.
        correct: whether the closed set's largest logit stays right `[n_groups, n_prompts]`.
        groups: names of the groups of heads.
        unit: the prompts' subjects `[n_prompts]`.
        units: what the units are called.
    """

    lost: np.ndarray
    correct: np.ndarray
    groups: tuple[str, ...]
    unit: np.ndarray
    units: str

    def share(self, group: str, of: str) -> Measured:
        """Return a group's loss as a share of another's, a ratio of sums over units."""
        above, below = (self.lost[self.groups.index(name)] for name in (group, of))
        lost, whole = (sums_by_unit(values, self.unit) for values in (above, below))
        return ratio_of_sums(lost, whole, self.units)

    def accuracy(self, group: str) -> Measured:
        """Return the share of right answers that a group's blindness leaves."""
        right = means_by_unit(self.correct[self.groups.index(group)], self.unit)
        return mean_over_units(right, self.units, share=True)


def knock_out(
    trial: Trial,
    pairs: Pairs,
    groups: Mapping[str, Sequence[Head]],
    *,
    others: Mapping[str, Sequence[Head]] | None = None,
) -> KnockOut:
    """Return what hiding the subject's tokens from heads at the last token does to recipients.

    Args:
        trial: the task and the model.
        pairs: whose recipients are read, each once.
        groups: heads that lose sight of the subject, by name.
        others: heads that lose sight of all tokens but the subject's and the last one, by name.
    """
    others = others or {}
    trial, task = _apart(trial, pairs), trial.task
    prompts = np.unique(pairs.prompts[:, 0])
    spans = zip(
        task.tokens, task.prompts["subject_start"], task.prompts["subject_position"], strict=True
    )
    subject, rest = [], []
    for tokens, start, end in spans:
        subject.append(list(range(start, end + 1)))
        rest.append([place for place in range(len(tokens) - 1) if not start <= place <= end])
    same = Pairs(np.stack([prompts, prompts], axis=1), task.unit[prompts])
    own = from_donors(trial.logits_after(prompts), np.arange(len(prompts)))
    found = patch_heads(
        trial.decoder,
        task.tokens,
        same.prompts,
        {**groups, **others},
        hidden=dict.fromkeys(groups, subject) | dict.fromkeys(others, rest),
        measure=WithChoice(own, task.answer_ids),
        forests=trial.forests,
    )
    units = f"{task.units} ({len(np.unique(same.unit))} read)"
    correct = found["choice"] == task.answer_index[prompts]
    return KnockOut(found["kl_nats"], correct, (*groups, *others), same.unit, units)


def writes_answer(trial: Trial, pairs: Pairs, heads: Sequence[Head]) -> dict[Head, Measured]:
    """Return how often the right answer is what a head itself writes most of.

    A head's direct effect on the logits is what the last state's logits lose without the head's
    output. Less its mean over the prompts, the largest of the closed answer set is what it writes.
    """
    task = trial.task
    rows = np.unique(pairs.prompts[:, 0])
    written = head_outputs(trial.decoder, task.tokens, heads, rows=rows, forests=trial.forests)
    last = trial.last_states[torch.as_tensor(rows)]
    ids = task.answer_ids.tolist()
    whole = logit_lens(trial.decoder, last, ids)
    unit = task.unit[rows]
    named = f"{task.units} ({len(np.unique(unit))} read)"
    found: dict[Head, Measured] = {}
    for head, output in zip(heads, written, strict=True):
        direct = (whole - logit_lens(trial.decoder, last - output, ids)).double()
        choice = (direct - direct.mean(dim=0)).argmax(-1).numpy()
        right = means_by_unit(choice == task.answer_index[rows], unit)
        found[head] = mean_over_units(right, named, share=True)
    return found
