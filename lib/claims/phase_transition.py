"""The phase transition: a sharp switch from context to prediction, a more gradual geometry.

Every statistic that the claim's criteria name, from transfers (`lib.evidence.transfer`) and states.
The last block counts nowhere. Units are subjects; of untrained twins, seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from lib.engine.edits import Add, Exchange
from lib.engine.extraction import extract_residuals, tokenize
from lib.engine.models import Decoder
from lib.engine.store import recall_sweeps
from lib.engine.sweeps import Request
from lib.engine.vectors import held_out_centroids, random_directions
from lib.evidence.criteria import Record
from lib.evidence.records import shown
from lib.evidence.tasks import Pairs, Task
from lib.evidence.transfer import (
    ARMS,
    Arm,
    DivergenceFromDonor,
    Transfer,
    Trial,
    divergence,
    measure_sites,
    needed_prompts,
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
    is_own,
    of_the_book,
    over_seeds,
    pool,
    ratio_of_sums,
    stack,
    sums_by_unit,
)
from lib.science.geometry import angles, jeffreys_divergence

CLAIM = "phase-transition"
PAPER_TASK = "months-arithmetic"
CONTROLS = ("random_direction", "covariance_matched", "other_task")
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

    @cached_property
    def estimates(self) -> dict[Arm, Measured]:
        """T at each block that was measured, the last one included, by arm."""
        return {arm: transfer.estimate() for arm, transfer in self.transfers.items()}

    def curve(self, arm: Arm) -> Measured:
        """Return T at each of `blocks`."""
        measured = self.transfers[arm].blocks
        found = self.estimates[arm].at([measured.index(block) for block in self.blocks])
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


def needed_rows(*pairs: Pairs) -> np.ndarray:
    """Return the prompts of the pairs, each once, ascending."""
    found: np.ndarray = np.unique(np.concatenate([own.prompts for own in pairs]))
    return found


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
        name: needed_prompts(trials[name].task, own.thin(TWIN_PAIRS)) for name, own in pairs.items()
    }
    read = read_tasks(twin, {name: task for name, (task, _) in few.items()})
    able = {name: one for name, one in read.items() if isinstance(one, Trial)}
    arms = measure_arms(able, {n: few[n][1][0] for n in able}, twin_blocks(twin.n_blocks))
    return {name: one if isinstance(one, Untested) else arms[name] for name, one in read.items()}


def as_twins(arms: Arms, pairs: Pairs) -> Arms:
    """Return the trained model's arms on the pairs and blocks that its twins are measured on."""
    return arms.restrict(pairs.spread(TWIN_PAIRS), twin_blocks(arms.n_blocks))


def measure_arms(
    trials: Mapping[str, Trial], pairs: Mapping[str, Pairs], blocks: Sequence[int] | None = None
) -> dict[str, Arms]:
    """Return by task what an exchange at the subject's token and one at the last token do."""
    found = measure_sites(
        trials, pairs, list(ARMS.values()), blocks=blocks, description="both arms"
    )
    return {
        name: Arms(
            trials[name].decoder.n_blocks,
            {arm: found[site][name] for arm, site in ARMS.items()},
            is_seed=trials[name].decoder.untrained,
        )
        for name in pairs
    }


def plateaus(arms: Arms) -> dict[str, Measured]:
    """Return a task's T in the early blocks and in the last sixth, of both arms, by statistic."""
    early, late = early_blocks(arms.n_blocks), last_sixth(arms.n_blocks)
    return {
        "context_early": arms.mean("context arm", early),
        "context_last_sixth": arms.mean("context arm", late),
        "prediction_early": arms.mean("prediction arm", early),
        "prediction_last_sixth": arms.mean("prediction arm", late),
    }


def widths(arms: Arms) -> dict[str, Measured]:
    """Return the widths of a task's fall and rise as shares of L, by statistic."""
    return {
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
    found = plateaus(arms)
    context = found["context_early"] - found["context_last_sixth"]
    return (context + found["prediction_last_sixth"] - found["prediction_early"]) * 0.5


def find_transition(arms: Arms) -> Measured:
    """Return ℓ*, where the task's context arm falls below its prediction arm, in blocks."""
    start, step = arms.blocks[0], _step(arms)
    crossed = curves.transition(arms.curve("context arm"), arms.curve("prediction arm"))
    return crossed * step + start


def curve_records(
    model: str,
    arms: Mapping[str, Arms | Untested],
    twins: Sequence[Mapping[str, Arms | Untested]],
) -> list[Record]:
    """Return records of each arm's T pooled over tasks, a block a place, and of its twins'."""
    records = []
    for arm in ARMS:
        records += shown(CLAIM, model, arm, _by_block(arms, arm))
        seeds = [_by_block(twin, arm) for twin in twins]
        places = {block: over_seeds([one[block] for one in seeds]) for block in seeds[0]}
        records += shown(CLAIM, model, arm, places, untrained=True)
    return records


def _by_block(arms: Mapping[str, Arms | Untested], arm: Arm) -> dict[str, Measured]:
    own = {name: one for name, one in of_the_book(arms).items() if isinstance(one, Arms)}
    if not own:
        return {}
    pooled = pool({name: one.curve(arm) for name, one in own.items()})
    blocks = next(iter(own.values())).blocks
    return {f"block {block}": pooled.at(n) for n, block in enumerate(blocks)}


def transition_spread(transitions: Mapping[str, Measured], n_blocks: int) -> Measured:
    """Return the largest distance of a task's ℓ* from the tasks' median, as a share of L.

    Drawn from the draws of the book's tasks together. A largest of several lies too high, so its
    upper half is what was drawn; the lower half is that of the task that is furthest off, spread so
    that it holds whichever task was picked (Bonferroni). Untested where fewer than two tasks have
    an ℓ*, or more than a quarter of those measured have none.
    """
    transitions = of_the_book(transitions)
    found = {name: one for name, one in transitions.items() if isinstance(one, Estimate)}
    lost = sorted(set(transitions) - set(found))
    if len(found) < 2:
        return Untested(f"a transition in {len(found)} of {len(transitions)} tasks; 2 are needed")
    if len(lost) > MOST_LOST * len(transitions):
        return Untested(f"no transition in {len(lost)} of {len(transitions)} tasks")
    together = np.stack([one.draws for one in found.values()])
    distances = np.abs(together - np.median(together, axis=0)) / n_blocks
    furthest = distances[distances[:, 0].argmax()]
    value, wider = furthest[0], norm.ppf(0.025 / len(found)) / norm.ppf(0.025)
    below = np.sort(value + (furthest[1:] - value) * wider)
    above = np.sort(distances[:, 1:].max(axis=0))
    half = len(below) // 2
    parts = list(found.values())
    return Estimate(
        np.concatenate([[value], below[:half], above[half:]]),
        " + ".join(sorted(one.units for one in parts)),
        sum(one.n_units for one in parts),
        n_least=min(one.n_least for one in parts),
    )


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
    """Return the task whose states stand in for this one's: chosen by names, not by their order.

    A reader's own task stands in for none of the book's.
    """
    others = [other for other in names if other != name]
    return min(
        [other for other in others if not is_own(other)] or others,
        key=lambda other: generator("other task", name, other).random(),
    )


@dataclass(frozen=True)
class Content:
    """What states put in where each arm carries do in one task.

    Attributes:
        transfer: T by what was put in, the donor's state or a control's, [context arm, prediction
            arm] `[2]`.
        beyond_chance: of the controls, the same less what they transfer of donors of a third
            answer, where that is above 0 `[2]`.
        same_answer: disturbance by donors of the same answer over that by the donor `[2]`.
        self_donor: the largest KL(p_x ‖ p_edited), nats, where a prompt is its own donor.
    """

    transfer: Mapping[str, Measured]
    beyond_chance: Mapping[str, Measured]
    same_answer: Measured
    self_donor: float

    @property
    def margin(self) -> Measured:
        """T of the donor less that of states drawn with mean and covariance of donors `[2]`."""
        return self.transfer["donor"] - self.transfer["covariance_matched"]


def measure_content(trials: Mapping[str, Trial], pairs: Mapping[str, Pairs]) -> dict[str, Content]:
    """Return by task what states with and without the donor's content do where each arm carries."""
    if not pairs:
        return {}
    small = {name: _narrow(trials[name], own) for name, own in pairs.items()}
    compared = {name: _compare(trial, own[0]) for name, (trial, own) in small.items()}
    decoder = trials[next(iter(pairs))].decoder
    done: dict[str, list[_Done]] = {name: [] for name in small}
    for arm, block in carrying_blocks(decoder.n_blocks).items():
        states = {name: states_at(trial, arm, [block])[0] for name, (trial, _) in small.items()}
        put, asked, alike_asked = {}, {}, {}
        for name, (trial, (own, alike)) in small.items():
            x, y = (torch.as_tensor(side) for side in own.prompts.T)
            at, others = states[name], states[other_task(name, small)]
            put[name] = {"donor": at[y], "itself": at[x]}
            put[name] |= control_states(trial.task, own, at, others, arm)
            logits, toward, *_ = compared[name]
            tiled = {k: np.tile(rows, len(put[name])) for k, rows in toward.items()}
            asked[name] = put_in(trial, logits, tiled, torch.cat(list(put[name].values())), arm)
            same = at[torch.as_tensor(alike.prompts[:, 1])]
            if len(alike):
                toward = {"recipient": alike.prompts[:, 0]}
                alike_asked[name] = put_in(trial, logits, toward, same, arm)
        edits = {"edit": Exchange()}
        swept = recall_sweeps(decoder, asked, edits, blocks=[block])
        swept_alike = recall_sweeps(decoder, alike_asked, edits, blocks=[block])
        for name in small:
            after = {
                k: dict(zip(put[name], values[0, 0].reshape(len(put[name]), -1), strict=True))
                for k, values in swept[name].measures.items()
            }
            same_after = (
                swept_alike[name].measures["recipient"][0, 0]
                if name in swept_alike
                else np.empty(0)
            )
            done[name].append(_Done(after, same_after))
    return {
        name: _content(trial, own, alike, *compared[name][2:], done[name])
        for name, (trial, (own, alike)) in small.items()
    }


@dataclass(frozen=True, eq=False)
class _Done:
    """What was put in for one arm did, nats: KL(p_k ‖ p_edited) by k and what, `[n_pairs]`."""

    after: Mapping[str, Mapping[str, np.ndarray]]
    same_answer: np.ndarray


def _compare(
    trial: Trial, pairs: Pairs
) -> tuple[Tensor, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray | None]:
    """Return logits to compare with, their rows by name, and KL(p_k ‖ p_x) before by name, nats.

    And what the mean over third answers adds, `third_answers`; None without them.
    """
    task, logits = trial.task, trial.logits
    x, y = pairs.prompts.T
    toward = {"recipient": x, "donor": y, "third": y}
    third = third_answers(task, pairs, logits)
    if third is not None:
        toward["third"] = len(logits) + np.arange(len(pairs))
        logits = torch.cat([logits, third[0]])
    before = {name: divergence(logits, rows, x) for name, rows in toward.items()}
    return logits, toward, before, None if third is None else third[1]


def _narrow(trial: Trial, pairs: Pairs) -> tuple[Trial, list[Pairs]]:
    """Return a trial of only the prompts in use, its pairs, and those of the same answer."""
    alike = same_answer_pairs(trial.task, pairs)
    task, own = needed_prompts(trial.task, pairs, alike)
    states = trial.last_states[torch.as_tensor(needed_rows(pairs, alike))]
    return replace(trial, task=task, last_states=states), own


def states_at(trial: Trial, arm: Arm, blocks: Sequence[int]) -> Tensor:
    """Return the states that an arm exchanges `[n_blocks, n_prompts, d_model]`.

    At the subject's token the prompts are read up to it: what follows cannot change them.
    """
    if arm == "prediction arm":
        return trial.states("last")[list(blocks)]
    ends = trial.task.subject_positions
    begun = [tokens[: end + 1] for tokens, end in zip(trial.task.tokens, ends, strict=True)]
    return extract_residuals(trial.decoder, begun, blocks=blocks).states


def control_states(
    task: Task, pairs: Pairs, states: Tensor, others: Tensor, arm: Arm
) -> dict[str, Tensor]:
    """Return what each control puts in the donor's place `[n_pairs, d_model]`.

    A state of random direction and the donor's norm; one drawn with mean and covariance of the
    states that the donor is one of (same template and group); one of another task.

    Args:
        task: the task.
        pairs: whose donors are replaced.
        states: the task's `[n_prompts, d_model]`.
        others: the other task's `[n, d_model]`.
        arm: where they are put in.
    """
    rng = generator("controls", task.name, arm)
    donors = states[torch.as_tensor(pairs.prompts[:, 1])]
    seeded = torch.Generator().manual_seed(int(rng.integers(2**62)))
    cell = _cells(task)
    drawn = []
    for donor in pairs.prompts[:, 1]:
        alike = states[torch.as_tensor(np.flatnonzero(cell == cell[donor]))].double()
        noise = torch.as_tensor(rng.standard_normal(len(alike))) / np.sqrt(max(len(alike) - 1, 1))
        drawn.append(alike.mean(dim=0) + noise @ (alike - alike.mean(dim=0)))
    return {
        "random_direction": random_directions(donors, seeded),
        "covariance_matched": torch.stack(drawn).to(donors),
        "other_task": others[torch.as_tensor(rng.choice(len(others), size=len(pairs)))],
    }


def _cells(task: Task) -> np.ndarray:
    found: np.ndarray = task.prompts.groupby(["template", "group"]).ngroup().to_numpy()
    return found


def third_answers(task: Task, pairs: Pairs, logits: Tensor) -> tuple[Tensor, np.ndarray] | None:
    """Return what stands for chance: the donors of a third answer that a pair might have had.

    Those z that share template and group with the pair's donor, and the answer with neither. Of
    their predictions only the mean p̄ enters, since the mean of KL(p_z ‖ q) over z is
    KL(p̄ ‖ q) + H(p̄) − mean H(p_z).

    Args:
        task: the task.
        pairs: its pairs.
        logits: its prompts' `[n_prompts, d_vocab]`.

    Returns:
        log p̄ `[n_pairs, d_vocab]` and H(p̄) − mean H(p_z), nats `[n_pairs]`; None where a pair has
        no third answer.
    """
    cell, answer = _cells(task), task.answer_index
    log_p = torch.log_softmax(logits.double(), -1)
    p, means, constants = log_p.exp(), [], []
    entropy = -(p * log_p).sum(-1)
    for x, y in pairs.prompts:
        fits = torch.as_tensor((cell == cell[y]) & (answer != answer[x]) & (answer != answer[y]))
        if not fits.any():
            return None
        mean = p[fits].mean(0)
        means.append(mean.log().float())
        constants.append(float(-(mean * mean.log()).sum() - entropy[fits].mean()))
    return torch.stack(means), np.array(constants)


@dataclass(frozen=True, eq=False)
class Divergences:
    """The measure of a sweep: KL(p_k ‖ q) for several distributions k.

    Attributes:
        logits: their logits `[n, d_vocab]`.
        rows: by name, which of them each pair is compared with `[n_pairs]`.
    """

    logits: Tensor
    rows: Mapping[str, np.ndarray]

    def __call__(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        """Return nats by name `[n_rows]`, float64, of edited logits `[n_rows, d_vocab]`."""
        return {
            name: DivergenceFromDonor(self.logits, rows)(logits, pair)["kl_nats"]
            for name, rows in self.rows.items()
        }


def _content(
    trial: Trial,
    pairs: Pairs,
    alike: Pairs,
    before: Mapping[str, np.ndarray],
    constant: np.ndarray | None,
    done: Sequence[_Done],
) -> Content:
    task, unit = trial.task, pairs.unit
    transfer: dict[str, list[Measured]] = {name: [] for name in ("donor", *CONTROLS)}
    beyond: dict[str, list[Measured]] = {name: [] for name in CONTROLS}
    ratios: list[Measured] = []
    itself = 0.0
    for one in done:
        after = one.after
        for name in transfer:
            near = _transfer(task, after["donor"][name], before["donor"], unit)
            transfer[name].append(near)
            if name in CONTROLS and constant is not None:
                far = _transfer(
                    task, after["third"][name] + constant, before["third"] + constant, unit
                )
                beyond[name].append(near - far.map(lambda t: np.maximum(t, 0)))
        itself = max(itself, float(after["recipient"]["itself"].max()))
        other = after["recipient"]["donor"]
        ratios.append(disturbance_ratio(task, one.same_answer, alike.unit, other, unit))
    lost = Untested(f"{len(task.answers)} answers leave no third one for some pairs")
    return Content(
        {name: stack(*both) for name, both in transfer.items()},
        {name: lost if constant is None else stack(*both) for name, both in beyond.items()},
        stack(*ratios),
        itself,
    )


def put_in(
    trial: Trial, logits: Tensor, toward: Mapping[str, np.ndarray], states: Tensor, arm: Arm
) -> Request:
    """Return the request to put states in, and to measure KL(p_k ‖ p_edited), nats, by name.

    Args:
        trial: the task and the model.
        logits: of the task's prompts, and of what else p_k may be `[…, d_vocab]`.
        toward: by name, the row k of the logits; "recipient" is the prompt that is edited `[n]`.
        states: what is put in `[n, d_model]`.
        arm: where.
    """
    task, recipients = trial.task, toward["recipient"]
    last = np.array([len(prompt) - 1 for prompt in task.tokens])
    return Request(
        task.tokens,
        np.stack([recipients, np.arange(len(recipients))], axis=1),
        task.subject_positions if arm == "context arm" else last,
        states[None],
        measure=Divergences(logits, toward),
    )


def _transfer(task: Task, after: np.ndarray, before: np.ndarray, unit: np.ndarray) -> Measured:
    """Return T of pairs `[n_pairs]`, drawn over units."""
    units, place = np.unique(unit, return_inverse=True)
    below = sums_by_unit(before, place, len(units))
    above = below - sums_by_unit(after, place, len(units))
    return ratio_of_sums(above, below, _named(task, units))


def same_answer_pairs(task: Task, pairs: Pairs) -> Pairs:
    """Return for each recipient of the pairs, where there is one, a donor of the same answer."""
    rng, cell, answer = generator("same answer", task.name), _cells(task), task.answer_index
    found = []
    for x, unit in zip(pairs.prompts[:, 0], pairs.unit, strict=True):
        fits = (cell == cell[x]) & (answer == answer[x]) & (task.unit != unit)
        if fits.any():
            found.append((x, rng.choice(np.flatnonzero(fits)), unit))
    table = np.array(found, dtype=np.int64).reshape(-1, 3)
    return Pairs(table[:, :2], table[:, 2])


def disturbance_ratio(
    task: Task, alike: np.ndarray, alike_unit: np.ndarray, other: np.ndarray, unit: np.ndarray
) -> Measured:
    """Return Σ KL(p_x ‖ p_edited) with donors of the same answer over that with other donors.

    Sums over subjects that have donors of both kinds, of each one's mean over its donors.

    Args:
        task: the task.
        alike: KL with donors of the same answer, nats `[n_alike]`.
        alike_unit: their recipients' subjects.
        other: KL with donors of another answer, nats `[n_pairs]`.
        unit: their recipients' subjects.
    """
    both = np.intersect1d(alike_unit, unit)
    if len(both) < FEWEST_UNITS:
        return Untested(f"donors of the same answer for {len(both)} subjects")
    above, below = (
        _mean_by_unit(values, own, both) for values, own in ((alike, alike_unit), (other, unit))
    )
    return ratio_of_sums(above, below, _named(task, both))


def _mean_by_unit(values: np.ndarray, unit: np.ndarray, units: np.ndarray) -> np.ndarray:
    kept = np.isin(unit, units)
    place = np.searchsorted(units, unit[kept])
    return sums_by_unit(values[kept], place, len(units)) / np.bincount(place)


def _named(task: Task, units: np.ndarray) -> str:
    """Name the units; a part of the subjects is told from the whole."""
    if len(units) == task.n_units:
        return task.units
    return f"{task.units} ({hashlib.sha256(units.tobytes()).hexdigest()[:8]})"


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


def measure_steering(
    trials: Mapping[str, Trial], pairs: Mapping[str, Pairs], blocks: Sequence[int]
) -> dict[Arm, dict[str, Transfer]]:
    """Return by arm and task what adding centroid differences of held-out templates does.

    That is how the paper steers. At the subject's token the centroids are those of donor's and
    recipient's subject, at the last token those of their answers, over the prompts of all other
    templates.

    Raises:
        ValueError: a task of one template.
    """
    vectors = {
        site: {
            name: _steering_vectors(trials[name], own, arm, blocks) for name, own in pairs.items()
        }
        for arm, site in ARMS.items()
    }
    found = measure_sites(
        trials,
        pairs,
        list(ARMS.values()),
        edit=Add(),
        donors=vectors,
        blocks=blocks,
        description="steering",
    )
    return {arm: found[site] for arm, site in ARMS.items()}


def _steering_vectors(trial: Trial, pairs: Pairs, arm: Arm, blocks: Sequence[int]) -> Tensor:
    """Return the donor's centroid less the recipient's `[n_blocks, n_pairs, d_model]`."""
    task = trial.task
    labels = task.unit if arm == "context arm" else task.answer_index
    template = task.prompts["template"].to_numpy()
    recipients, donors = pairs.prompts.T
    used = np.flatnonzero(np.isin(labels, labels[pairs.prompts]))  # no others enter a centroid
    part = replace(task, prompts=task.prompts.iloc[used].reset_index(drop=True))
    states = states_at(replace(trial, task=part), arm, blocks)
    to, away = (
        held_out_centroids(states, labels[used], template[used], labels[rows], template[recipients])
        for rows in (donors, recipients)
    )
    return to - away


def second_operand(trial: Trial, pairs: Pairs) -> tuple[Trial, Pairs]:
    """Return a task with groups as one whose subject is the group, and its pairs.

    In month arithmetic: the offset is exchanged instead of the base month. Recipient and donor
    share template and month; each recipient of `pairs` gets the next of the offsets in use. Prompts
    in which the tokenizer joins the group's word with what stands before it are left out.
    """
    prompts = trial.task.prompts
    starts, ends, lost = [], [], set()
    for row, (text, group, tokens) in enumerate(
        zip(prompts["text"], prompts["group"], prompts["tokens"], strict=True)
    ):
        at = text.rindex(group)
        before, upto = tokenize(trial.decoder, [text[:at].rstrip(), text[:at] + group])
        if tokens[: len(upto)] != upto or not len(before) < len(upto):
            lost.add(row)
        starts.append(len(before))
        ends.append(len(upto) - 1)
    groups = sorted(set(prompts["group"].iloc[pairs.prompts.ravel()]))
    rows = {
        key: row
        for row, key in enumerate(
            zip(prompts["template"], prompts["unit"], prompts["group"], strict=True)
        )
    }
    found = []
    for x in np.unique(pairs.prompts[:, 0]):
        template, unit, group = (prompts[name].iloc[x] for name in ("template", "unit", "group"))
        other = groups[(groups.index(group) + 1) % len(groups)]
        donor = rows.get((template, unit, other))
        if donor is not None and other != group and not {int(x), donor} & lost:
            found.append((x, donor, unit))
    table = np.array(found, dtype=np.int64).reshape(-1, 3)
    task = replace(trial.task, prompts=prompts.assign(subject_start=starts, subject_position=ends))
    return replace(trial, task=task), Pairs(table[:, :2], table[:, 2])


# --- all of them ----------------------------------------------------------------------------------

ByTask = Mapping[str, Measured]


def statistics(
    n_blocks: int,
    arms: Mapping[str, Arms | Untested],
    contents: Mapping[str, Content],
    alignments: ByTask,
    shared: Mapping[str, Arms],
    twins: Sequence[Mapping[str, Arms | Untested]],
) -> tuple[dict[str, Measured | ByTask], dict[str, Measured | ByTask]]:
    """Return every statistic of the criteria, of the trained model and of its twins.

    Args:
        n_blocks: L of the model.
        arms: by task; a task that cannot be measured is Untested everywhere.
        contents: `measure_content` by task.
        alignments: `alignment` by task.
        shared: the trained model's arms by task, on the twins' pairs and blocks.
        twins: the twins' arms by task, one entry a seed.
    """
    trained: dict[str, Measured | ByTask] = dict(_by_statistic(arms))
    trained["hand_over_beyond_twins"] = beyond_twins(shared, twins)
    for name in CONTROLS:
        trained[name] = _where(arms, {t: one.beyond_chance[name] for t, one in contents.items()})
    trained["content_margin"] = _where(arms, {t: one.margin for t, one in contents.items()})
    trained["same_answer_disturbance"] = _where(
        arms, {t: one.same_answer for t, one in contents.items()}
    )
    transitions = {t: find_transition(one) for t, one in arms.items() if isinstance(one, Arms)}
    trained["transition_spread"] = transition_spread(transitions, n_blocks)
    measured = {t: one for t, one in arms.items() if isinstance(one, Arms)}
    gaps = {task: width_gap(alignments[task], one) for task, one in measured.items()}
    trained["width_gap"] = _where(arms, gaps)
    return trained, _twin_statistics(n_blocks, twins)


def _where(arms: Mapping[str, Arms | Untested], measured: ByTask) -> ByTask:
    """Return what was measured by task, and the reasons of the tasks that were not."""
    return {n: one if isinstance(one, Untested) else measured[n] for n, one in arms.items()}


def _by_statistic(arms: Mapping[str, Arms | Untested]) -> dict[str, ByTask]:
    found = {
        task: {**plateaus(one), **widths(one)}
        for task, one in arms.items()
        if isinstance(one, Arms)
    }
    names = next(iter(found.values()), {})
    return {name: _where(arms, {task: own[name] for task, own in found.items()}) for name in names}


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
    for name in (*CONTROLS, "content_margin", "same_answer_disturbance", "width_gap"):
        result[name] = dict.fromkeys(twins[0], _TRAINED_ONLY)
    return result
