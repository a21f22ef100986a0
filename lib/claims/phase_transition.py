"""The phase transition: a sharp switch from context to prediction, a more gradual geometry.

Every statistic that the claim's criteria name, from transfers (`lib.evidence.transfer`) and states.
The last block counts nowhere. Units are subjects; of untrained twins, seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib.engine.edits import Add, Exchange
from lib.engine.models import Decoder
from lib.engine.store import recall_sweep
from lib.engine.vectors import held_out_centroids, random_directions
from lib.evidence.tasks import Pairs, Task, exchange_pairs
from lib.evidence.transfer import (
    ARMS,
    Arm,
    DivergenceFromDonor,
    Transfer,
    Trial,
    measure_transfer,
    read_tasks,
)
from lib.science import curves
from lib.science.correlation import correlate
from lib.science.curves import early_blocks, last_sixth
from lib.science.estimate import (
    FEWEST_UNITS,
    Estimate,
    Measured,
    Untested,
    generator,
    independent_difference,
    mean_over_units,
    pool,
    ratio_of_sums,
    stack,
    sums_by_unit,
)
from lib.science.geometry import angles, jeffreys_divergence

CLAIM = "phase-transition"
PAPER_TASK = "months-arithmetic"
N_DONORS = 1
"""Donors of a subject: with this many subjects a second one says little that is new."""
CONTROLS = ("random_direction", "covariance_matched", "other_task")
SEEDS = "seeds"
TWIN_PAIRS = 12
"""Pairs of a task that twins are measured on: a seed is one number, and there are many tasks."""
MOST_LOST = 0.25
"""The place of the switch is judged if at most this share of the tasks has none."""
_TRAINED_ONLY = Untested("measured where a trained model carries it, not on untrained twins")


@dataclass(frozen=True)
class Arms:
    """Both arms of one task on the same pairs.

    Attributes:
        n_blocks: L of the model.
        transfers: what the exchange did, by arm, at the same blocks.
        is_seed: whether they are one twin's: a seed is one number, so the draws over subjects are
            not looked at, and only two of them are kept.
    """

    n_blocks: int
    transfers: Mapping[Arm, Transfer]
    is_seed: bool = False

    @property
    def blocks(self) -> list[int]:
        """The blocks that were measured and count: all but the model's last."""
        measured = next(iter(self.transfers.values())).blocks
        return [block for block in measured if block < self.n_blocks - 1]

    @property
    def estimates(self) -> dict[Arm, Measured]:
        """T at each block that was measured, the last one included, by arm."""
        return {arm: transfer.estimate() for arm, transfer in self.transfers.items()}

    def curve(self, arm: Arm) -> Measured:
        """Return T at each of `blocks`."""
        transfer = self.transfers[arm]
        found = transfer.estimate().at([transfer.blocks.index(block) for block in self.blocks])
        if self.is_seed and isinstance(found, Estimate):
            return replace(found, draws=found.draws[:1].repeat(3, axis=0))
        return found

    def mean(self, arm: Arm, chosen: Sequence[int] | range) -> Measured:
        """Return the mean T over those of the chosen blocks that were measured."""
        return self.curve(arm).over([n for n, block in enumerate(self.blocks) if block in chosen])

    def restrict(self, pairs: np.ndarray, blocks: Sequence[int]) -> Arms:
        """Return the arms on some of the pairs `[n_kept]` and blocks."""
        return replace(
            self,
            transfers={
                arm: replace(
                    one,
                    blocks=tuple(blocks),
                    after=one.after[[one.blocks.index(b) for b in blocks]][:, pairs],
                    before=one.before[pairs],
                    choice=one.choice[[one.blocks.index(b) for b in blocks]][:, pairs],
                    target=one.target[pairs],
                    unit=one.unit[pairs],
                )
                for arm, one in self.transfers.items()
            },
        )


# --- pairs ----------------------------------------------------------------------------------------


def choose_pairs(
    trial: Trial | Untested, *, n_donors: int = N_DONORS, same_answer: bool = False
) -> Pairs | Untested:
    """Return the task's pairs, of all prompts, or of the groups that pass the gate.

    Transfer needs no right answers. But a task with groups (the offsets of month arithmetic) is
    measured on those that the model masters, and not at all without one.
    """
    if isinstance(trial, Untested):
        return trial
    grouped = bool((trial.task.prompts["group"] != "").any())
    if grouped and trial.gate is not None:
        return trial.gate
    groups = trial.able_groups if grouped else None
    pairs = exchange_pairs(trial.task, n_donors=n_donors, same_answer=same_answer, groups=groups)
    if len(np.unique(pairs.unit)) < FEWEST_UNITS:
        kind = "of the same answer" if same_answer else "of another answer"
        return Untested(f"donors {kind} for {len(np.unique(pairs.unit))} subjects")
    return pairs


def thin(pairs: Pairs, most: int) -> np.ndarray:
    """Return which pairs are kept where `most` of them have to do, spread evenly `[n_kept]`."""
    return np.unique(np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int))


def needed_prompts(task: Task, pairs: Pairs) -> tuple[Task, Pairs]:
    """Return the task with only the prompts that the pairs need, and the pairs numbered in it."""
    rows, place = np.unique(pairs.prompts, return_inverse=True)
    prompts = task.prompts.iloc[rows].reset_index(drop=True)
    return replace(task, prompts=prompts), replace(pairs, prompts=place.reshape(-1, 2))


def twin_blocks(n_blocks: int) -> list[int]:
    """Return the blocks that twins are measured after: every third from L − 2 down; all if few."""
    step = 3 if n_blocks >= 12 else 1
    return list(range((n_blocks - 2) % step, n_blocks - 1, step))


def carrying_blocks(n_blocks: int) -> Mapping[Arm, int]:
    """Return where each arm carries: the middle early block, the first of the last sixth."""
    early = early_blocks(n_blocks)
    return {"context arm": early[len(early) // 2], "prediction arm": last_sixth(n_blocks)[0]}


# --- the switch -----------------------------------------------------------------------------------


def measure_twin(
    twin: Decoder, trials: Mapping[str, Trial], pairs: Mapping[str, Pairs]
) -> dict[str, Arms | Untested]:
    """Return both arms of an untrained twin by task, on few pairs and every third block.

    Of each task `TWIN_PAIRS` pairs of the trained model's; only their prompts are read.
    """
    few = {
        name: needed_prompts(trials[name].task, own.where(thin(own, TWIN_PAIRS)))
        for name, own in pairs.items()
    }
    read = read_tasks(twin, {name: task for name, (task, _) in few.items()})
    return {
        name: one
        if isinstance(one, Untested)
        else measure_arms(one, few[name][1], twin_blocks(twin.n_blocks))
        for name, one in read.items()
    }


def as_twins(arms: Arms, pairs: Pairs) -> Arms:
    """Return the trained model's arms on the pairs and blocks that its twins are measured on."""
    return arms.restrict(thin(pairs, TWIN_PAIRS), twin_blocks(arms.n_blocks))


def measure_arms(trial: Trial, pairs: Pairs, blocks: Sequence[int] | None = None) -> Arms:
    """Return what an exchange at the subject's token and one at the last token do to the pairs."""
    transfers = {
        arm: measure_transfer(
            trial, pairs, site, blocks=blocks, description=f"{trial.task.name}: {arm}"
        )
        for arm, site in ARMS.items()
    }
    return Arms(trial.decoder.n_blocks, transfers, is_seed=trial.decoder.untrained)


def switch(arms: Arms) -> dict[str, Measured]:
    """Return a task's numbers of the part "switch" by statistic: T, and widths as shares of L."""
    early, late = early_blocks(arms.n_blocks), last_sixth(arms.n_blocks)
    return {
        "context_early": arms.mean("context arm", early),
        "context_last_sixth": arms.mean("context arm", late),
        "prediction_early": arms.mean("prediction arm", early),
        "prediction_last_sixth": arms.mean("prediction arm", late),
        "context_fall_width": _width(arms, "context arm") / arms.n_blocks,
        "prediction_rise_width": _width(arms, "prediction arm") / arms.n_blocks,
    }


def _width(arms: Arms, arm: Arm) -> Measured:
    """Return the width of an arm's fall or rise in blocks; its blocks are evenly spaced."""
    rising, step = arm == "prediction arm", _step(arms)
    return arms.curve(arm).map(lambda curve: step * curves.width(curve, rising=rising))


def _step(arms: Arms) -> int:
    return arms.blocks[1] - arms.blocks[0] if len(arms.blocks) > 1 else 1


def hand_over(arms: Arms) -> Measured:
    """Return S = ½ (context early − last sixth + prediction last sixth − early), in T."""
    found = switch(arms)
    context = found["context_early"] - found["context_last_sixth"]
    return (context + found["prediction_last_sixth"] - found["prediction_early"]) * 0.5


def find_transition(arms: Arms) -> Measured:
    """Return ℓ*, where the task's context arm falls below its prediction arm, in blocks."""
    start, step = arms.blocks[0], _step(arms)
    crossed = curves.transition(arms.curve("context arm"), arms.curve("prediction arm"))
    return crossed * step + start


def transition_spread(transitions: Mapping[str, Measured], n_blocks: int) -> Measured:
    """Return the largest distance of a task's ℓ* from the tasks' median, as a share of L.

    Drawn from the tasks' draws together. Untested where fewer than two tasks have an ℓ*, or more
    than a quarter of those measured have none.
    """
    found = {name: one for name, one in transitions.items() if isinstance(one, Estimate)}
    lost = sorted(set(transitions) - set(found))
    if len(found) < 2:
        return Untested(f"a transition in {len(found)} of {len(transitions)} tasks; 2 are needed")
    if len(lost) > MOST_LOST * len(transitions):
        return Untested(f"no transition in {len(lost)} of {len(transitions)} tasks")
    together = np.stack([one.draws for one in found.values()])
    spread = np.abs(together - np.median(together, axis=0)).max(axis=0) / n_blocks
    parts = list(found.values())
    return Estimate(
        spread,
        " + ".join(sorted(one.units for one in parts)),
        sum(one.n_units for one in parts),
        n_least=min(one.n_least for one in parts),
    )


def over_seeds(values: Sequence[Measured]) -> Measured:
    """Return the mean over twins of one number each; Untested if any of them is."""
    lost = [one.reason for one in values if isinstance(one, Untested)]
    if lost:
        return Untested(f"{len(lost)} of {len(values)} twins: {lost[0]}")
    numbers = [one.value for one in values if isinstance(one, Estimate)]
    return mean_over_units(numbers, SEEDS)


def beyond_twins(
    trained: Mapping[str, Arms], twins: Sequence[Mapping[str, Arms | Untested]]
) -> Measured:
    """Return S of the trained model less that of its twins, both pooled over tasks.

    Args:
        trained: by task, on the twins' pairs and blocks.
        twins: the same of each seed.
    """
    own = {name: hand_over(arms) for name, arms in trained.items()}
    seeds = [
        {name: one if isinstance(one, Untested) else hand_over(one) for name, one in twin.items()}
        for twin in twins
    ]
    shared = [
        name for name in own if all(isinstance(one.get(name), Estimate) for one in (own, *seeds))
    ]
    theirs = over_seeds([pool({name: twin[name] for name in shared}) for twin in seeds])
    return independent_difference(pool({name: own[name] for name in shared}), theirs)


# --- what the donor has to be ---------------------------------------------------------------------


def other_task(name: str, names: Collection[str]) -> str:
    """Return the task whose states stand in for this one's: chosen by names, not by their order."""
    return min(
        (other for other in names if other != name),
        key=lambda other: generator("other task", name, other).random(),
    )


def control_states(
    trial: Trial, other: Trial, pairs: Pairs, arm: Arm, blocks: Sequence[int]
) -> dict[str, Tensor]:
    """Return what each control puts in the donor's place `[n_blocks, n_pairs, d_model]`.

    A state of random direction and the donor's norm; one drawn with mean and covariance of the
    states that the donor is one of (same template and group); one of another task's prompts.
    """
    site = ARMS[arm]
    assert site in ("subject", "last")
    rng = generator("controls", trial.task.name, arm)
    own, others = trial.states(site)[list(blocks)], other.states(site)[list(blocks)]
    donors = own[:, torch.as_tensor(pairs.prompts[:, 1])]
    seeded = torch.Generator().manual_seed(int(rng.integers(2**62)))
    prompts = trial.task.prompts
    cell = prompts.groupby(["template", "group"]).ngroup().to_numpy()
    drawn = torch.empty_like(donors)
    for pair, donor in enumerate(pairs.prompts[:, 1]):
        alike = own[:, torch.as_tensor(np.flatnonzero(cell == cell[donor]))].double()
        centred = alike - alike.mean(dim=1, keepdim=True)
        noise = torch.as_tensor(rng.standard_normal(alike.shape[1])) / np.sqrt(alike.shape[1] - 1)
        state = alike.mean(dim=1) + torch.einsum("bpd,p->bd", centred, noise)
        drawn[:, pair] = state.to(drawn)
    strangers = rng.choice(other.task.n_prompts, size=len(pairs))
    return {
        "random_direction": random_directions(donors, seeded),
        "covariance_matched": drawn,
        "other_task": others[:, torch.as_tensor(strangers)],
    }


def measure_controls(trial: Trial, other: Trial, pairs: Pairs) -> dict[str, Measured]:
    """Return T towards the nominal donor of each control, [context arm, prediction arm] `[2]`.

    Each arm is measured where it carries (`carrying_blocks`).
    """
    found: dict[str, list[Measured]] = {name: [] for name in CONTROLS}
    for arm, block in carrying_blocks(trial.decoder.n_blocks).items():
        for name, states in control_states(trial, other, pairs, arm, [block]).items():
            transfer = measure_transfer(trial, pairs, ARMS[arm], donors=states, blocks=[block])
            found[name].append(transfer.estimate().at(0))
    return {name: stack(*both) for name, both in found.items()}


def disturbance(trial: Trial, pairs: Pairs, arm: Arm, block: int) -> np.ndarray:
    """Return KL(p_x ‖ p_edited) of an exchange after one block, nats `[n_pairs]`."""
    task = trial.task
    own, index = np.unique(pairs.prompts[:, 0], return_inverse=True)
    last = np.array([len(prompt) - 1 for prompt in task.tokens])
    sweep = recall_sweep(
        trial.decoder,
        task.tokens,
        pairs.prompts,
        {"edit": Exchange()},
        positions=task.subject_positions if arm == "context arm" else last,
        blocks=[block],
        measure=DivergenceFromDonor(trial.logits[own], index),
    )
    result: np.ndarray = sweep.measures["kl_nats"][0, 0]
    return result


def self_donor(trial: Trial, n_prompts: int = 5) -> float:
    """Return the largest KL(p_x ‖ p_edited), nats, where each prompt is its own donor."""
    chosen = np.linspace(0, trial.task.n_prompts - 1, n_prompts).round().astype(int)
    pairs = Pairs(np.stack([chosen, chosen], axis=1), trial.task.unit[chosen])
    blocks = carrying_blocks(trial.decoder.n_blocks)
    return max(float(disturbance(trial, pairs, arm, block).max()) for arm, block in blocks.items())


def same_answer_disturbance(trial: Trial, pairs: Pairs) -> Measured:
    """Return the disturbance by donors of the same answer over that by others, by arm `[2]`.

    A ratio of sums over subjects of each one's mean over its donors; of the subjects that have
    donors of both kinds.
    """
    alike = choose_pairs(trial, same_answer=True)
    if isinstance(alike, Untested):
        return alike
    units = np.intersect1d(alike.unit, pairs.unit)
    if len(units) < FEWEST_UNITS:
        return Untested(f"donors of the same answer for {len(units)} subjects")
    ratios = []
    for arm, block in carrying_blocks(trial.decoder.n_blocks).items():
        above, below = (
            _mean_by_unit(disturbance(trial, chosen, arm, block), chosen.unit, units)
            for chosen in (alike, pairs)
        )
        ratios.append(ratio_of_sums(above, below, _named(trial.task, units)))
    return stack(*ratios)


def _mean_by_unit(values: np.ndarray, unit: np.ndarray, units: np.ndarray) -> np.ndarray:
    kept = np.isin(unit, units)
    place = np.searchsorted(units, unit[kept])
    return sums_by_unit(values[kept], place, len(units)) / np.bincount(place)


def _named(task: Task, units: np.ndarray) -> str:
    return task.units if len(units) == task.n_units else f"{task.units} with another of its answer"


# --- the geometry ---------------------------------------------------------------------------------


def alignment(trial: Trial, transfer: Transfer) -> Measured:
    """Return ρ(θ, J) at the last token after each block but the last, of a transfer's subjects.

    Spearman's correlation of the angles between states with the Jeffreys divergences of the
    predictions, within each template (and group), their mean; drawn over subjects, as the transfer.
    """
    whole = transfer.estimate()
    if isinstance(whole, Untested):
        return whole
    prompts, units = trial.task.prompts, np.unique(transfer.unit)
    states, logits = trial.states("last"), trial.logits
    found: list[Measured] = []
    for _, cell in prompts.groupby(["template", "group"]):
        own = cell[cell["unit"].isin(units)].sort_values("unit")
        if len(own) < len(units):
            continue  # a group that lacks some of the subjects
        rows = torch.as_tensor(own.index.to_numpy(copy=True))
        by_block = [angles(states[block, rows]) for block in range(len(states) - 1)]
        found.append(correlate(by_block, jeffreys_divergence(logits[rows]), whole.units))
    if not found:
        return Untested("no template or group holds all subjects")
    total = found[0]
    for one in found[1:]:
        total = total + one
    return total / len(found)


def rise_width(rho: Measured) -> Measured:
    """Return the width of the rise of a curve per block, in blocks."""
    return rho.map(lambda curve: curves.width(curve, rising=True))


def width_gap(rho: Measured, arms: Arms) -> Measured:
    """Return the width of ρ(θ, J)'s rise less that of the prediction arm's, in blocks."""
    return rise_width(rho) - _width(arms, "prediction arm")


# --- shown beside the statistics ------------------------------------------------------------------


def measure_steering(trial: Trial, pairs: Pairs, arm: Arm, blocks: Sequence[int]) -> Transfer:
    """Return what adding centroid differences of held-out templates does, as the paper steers.

    At the subject's token the centroids are those of donor's and recipient's subject, at the last
    token those of their answers, over the prompts of all other templates.

    Raises:
        ValueError: a task of one template.
    """
    site = ARMS[arm]
    assert site in ("subject", "last")
    task = trial.task
    labels = task.unit if arm == "context arm" else task.answer_index
    template = task.prompts["template"].to_numpy()
    states = trial.states(site)[list(blocks)]
    recipients, donors = pairs.prompts.T
    to, away = (
        held_out_centroids(states, labels, template, labels[rows], template[recipients])
        for rows in (donors, recipients)
    )
    return measure_transfer(
        trial,
        pairs,
        site,
        edit=Add(),
        donors=to - away,
        blocks=blocks,
        description=f"{task.name}: steering, {arm}",
    )


# --- all of them ----------------------------------------------------------------------------------

ByTask = Mapping[str, Measured]


def statistics(
    n_blocks: int,
    arms: Mapping[str, Arms | Untested],
    controls: Mapping[str, Mapping[str, Measured]],
    same_answer: ByTask,
    alignments: ByTask,
    shared: Mapping[str, Arms],
    twins: Sequence[Mapping[str, Arms | Untested]],
) -> tuple[dict[str, Measured | ByTask], dict[str, Measured | ByTask]]:
    """Return every statistic of the criteria, of the trained model and of its twins.

    Args:
        n_blocks: L of the model.
        arms: by task; a task that cannot be measured is Untested everywhere.
        controls: `measure_controls` by task.
        same_answer: `same_answer_disturbance` by task.
        alignments: `alignment` by task.
        shared: the trained model's arms by task, on the twins' pairs and blocks.
        twins: the twins' arms by task, one entry a seed.
    """
    trained: dict[str, Measured | ByTask] = dict(_by_statistic(arms))
    trained["hand_over_beyond_twins"] = beyond_twins(shared, twins)
    for name in CONTROLS:
        trained[name] = {task: _of(one, controls, task, name) for task, one in arms.items()}
    trained["same_answer_disturbance"] = {
        task: one if isinstance(one, Untested) else same_answer[task] for task, one in arms.items()
    }
    transitions = {
        task: find_transition(one) for task, one in arms.items() if isinstance(one, Arms)
    }
    trained["transition_spread"] = transition_spread(transitions, n_blocks)
    trained["width_gap"] = {
        task: one if isinstance(one, Untested) else width_gap(alignments[task], one)
        for task, one in arms.items()
    }
    return trained, _twin_statistics(n_blocks, twins)


def _of(
    one: Arms | Untested, controls: Mapping[str, Mapping[str, Measured]], task: str, name: str
) -> Measured:
    return one if isinstance(one, Untested) else controls[task][name]


def _by_statistic(arms: Mapping[str, Arms | Untested]) -> dict[str, ByTask]:
    found: dict[str, Untested | dict[str, Measured]] = {
        task: one if isinstance(one, Untested) else switch(one) for task, one in arms.items()
    }
    names = next((list(one) for one in found.values() if isinstance(one, dict)), [])
    return {
        name: {task: one if isinstance(one, Untested) else one[name] for task, one in found.items()}
        for name in names
    }


def _twin_statistics(
    n_blocks: int, twins: Sequence[Mapping[str, Arms | Untested]]
) -> dict[str, Measured | ByTask]:
    tables = [_by_statistic(twin) for twin in twins]
    result: dict[str, Measured | ByTask] = {
        name: {task: over_seeds([table[name][task] for table in tables]) for task in by_task}
        for name, by_task in tables[0].items()
    }
    result["transition_spread"] = over_seeds(
        [
            transition_spread(
                {task: find_transition(one) for task, one in twin.items() if isinstance(one, Arms)},
                n_blocks,
            )
            for twin in twins
        ]
    )
    for name in (*CONTROLS, "same_answer_disturbance", "width_gap"):
        result[name] = dict.fromkeys(twins[0], _TRAINED_ONLY)
    return result
