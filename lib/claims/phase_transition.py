"""The phase transition: a sharp switch from context to prediction, a more gradual geometry.

Every statistic that the claim's criteria name, from transfers (`lib.evidence.transfer`), states put
in (`lib.evidence.content`) and angles. The last block counts nowhere. Units are subjects; of
untrained twins, seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from lib.engine.edits import add
from lib.engine.extraction import tokenize
from lib.engine.models import Decoder
from lib.engine.vectors import held_out_centroids
from lib.evidence.by_task import beyond_twins, each, over_twins
from lib.evidence.content import CONTROLS, Content, states_at
from lib.evidence.criteria import Record
from lib.evidence.records import shown
from lib.evidence.tasks import Pairs
from lib.evidence.transfer import (
    ARMS,
    Arm,
    Transfer,
    Trial,
    measure_sites,
    needed_prompts,
    read_tasks,
)
from lib.science import curves
from lib.science.correlation import correlate
from lib.science.curves import early_blocks, last_sixth
from lib.science.estimate import (
    FEWEST_DRAWS,
    Estimate,
    Measured,
    Untested,
    mean_of,
    of_the_book,
    over_seeds,
    pool,
    stack,
)
from lib.science.geometry import angles, jeffreys_divergence

CLAIM = "phase-transition"
PAPER_TASK = "months-arithmetic"
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
            return replace(found, draws=found.draws[:1].repeat(1 + FEWEST_DRAWS, axis=0))
        return found

    def mean(self, arm: Arm, chosen: Sequence[int] | range) -> Measured:
        """Return the mean T over those of the chosen blocks that were measured."""
        return self.curve(arm).over([n for n, block in enumerate(self.blocks) if block in chosen])

    def restrict(self, pairs: np.ndarray, blocks: Sequence[int]) -> Arms:
        """Return the arms on some of the pairs `[n_kept]` and blocks."""
        kept = {arm: one.where(pairs, blocks) for arm, one in self.transfers.items()}
        return replace(self, transfers=kept)


ByTask = Mapping[str, Measured]
ArmsByTask = Mapping[str, Arms | Untested]
"""A task that cannot be measured has the reason in its arms' place."""


# --- the switch -----------------------------------------------------------------------------------


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
    both = stack(arms.curve("context arm"), arms.curve("prediction arm"))
    return both.map(lambda pair: curves.crossing(*pair)) * step + start


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


# --- twins ----------------------------------------------------------------------------------------


def twin_blocks(n_blocks: int) -> list[int]:
    """Return the blocks that twins are measured after: every third from L − 2 down; all if few."""
    step = 3 if n_blocks >= 12 else 1
    return list(range((n_blocks - 2) % step, n_blocks - 1, step))


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


# --- the geometry ---------------------------------------------------------------------------------


def alignment(trial: Trial, transfer: Transfer) -> Measured:
    """Return ρ(θ, J) at the last token after each block but the last, of a transfer's subjects.

    Spearman's correlation of the angles between states with the Jeffreys divergences of the
    predictions, within each template (and group), their mean; drawn over subjects, as the transfer.
    """
    whole = transfer.estimate()
    if isinstance(whole, Untested):
        return whole
    states, logits = trial.states("last"), trial.logits
    found: list[Measured] = []
    for rows in map(torch.as_tensor, trial.task.cells(np.unique(transfer.unit))):
        by_block = [angles(states[block, rows]) for block in range(len(states) - 1)]
        found.append(correlate(by_block, jeffreys_divergence(logits[rows]), whole.units))
    return mean_of(found) if found else Untested("no template or group holds all subjects")


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
        edit=add,
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
    keys = zip(prompts["template"], prompts["unit"], prompts["group"], strict=True)
    rows = {key: row for row, key in enumerate(keys)}
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


def curve_records(model: str, arms: ArmsByTask, twins: Sequence[ArmsByTask]) -> list[Record]:
    """Return records of each arm's T pooled over tasks, a block a place, and of its twins'."""
    records = []
    for arm in ARMS:
        records += shown(CLAIM, model, arm, _by_block(arms, arm))
        seeds = [_by_block(twin, arm) for twin in twins]
        places = {block: over_seeds([one[block] for one in seeds]) for block in seeds[0]}
        records += shown(CLAIM, model, arm, places, untrained=True)
    return records


def _by_block(arms: ArmsByTask, arm: Arm) -> dict[str, Measured]:
    own = _tested(of_the_book(arms))
    if not own:
        return {}
    pooled = pool({name: one.curve(arm) for name, one in own.items()})
    blocks = next(iter(own.values())).blocks
    return {f"block {block}": pooled.at(n) for n, block in enumerate(blocks)}


# --- all of them ----------------------------------------------------------------------------------


def statistics(
    n_blocks: int,
    arms: ArmsByTask,
    contents: Mapping[str, Content],
    alignments: ByTask,
    shared: Mapping[str, Arms],
    twins: Sequence[ArmsByTask],
) -> tuple[dict[str, Measured | ByTask], dict[str, Measured | ByTask]]:
    """Return every statistic of the criteria, of the trained model and of its twins.

    Args:
        n_blocks: L of the model.
        arms: by task; a task that cannot be measured is Untested everywhere.
        contents: `lib.evidence.content.measure_content` by task.
        alignments: `alignment` by task.
        shared: the trained model's arms by task, on the twins' pairs and blocks.
        twins: the twins' arms by task, one entry a seed.
    """
    trained: dict[str, Measured | ByTask] = dict(_by_statistic(arms))
    seeds = [each(twin, hand_over) for twin in twins]
    trained["hand_over_beyond_twins"] = beyond_twins(each(shared, hand_over), seeds)
    for name in CONTROLS:
        trained[name] = _where(arms, {t: one.beyond_chance[name] for t, one in contents.items()})
    trained["content_margin"] = _where(arms, {t: one.margin for t, one in contents.items()})
    alike = {task: one.same_answer for task, one in contents.items()}
    trained["same_answer_disturbance"] = _where(arms, alike)
    trained["transition_spread"] = _spread(arms, n_blocks)
    gaps = {task: width_gap(alignments[task], one) for task, one in _tested(arms).items()}
    trained["width_gap"] = _where(arms, gaps)
    return trained, _twin_statistics(n_blocks, twins)


def _where(arms: ArmsByTask, measured: ByTask) -> ByTask:
    """Return what was measured by task, and the reasons of the tasks that were not."""
    return {n: one if isinstance(one, Untested) else measured[n] for n, one in arms.items()}


def _tested(arms: ArmsByTask) -> dict[str, Arms]:
    return {name: one for name, one in arms.items() if isinstance(one, Arms)}


def _spread(arms: ArmsByTask, n_blocks: int) -> Measured:
    found = {task: find_transition(one) for task, one in _tested(arms).items()}
    return transition_spread(found, n_blocks)


def _by_statistic(arms: ArmsByTask) -> dict[str, ByTask]:
    found = {task: plateaus(one) | widths(one) for task, one in _tested(arms).items()}
    names = next(iter(found.values()), {})
    return {name: _where(arms, {task: own[name] for task, own in found.items()}) for name in names}


def _twin_statistics(n_blocks: int, twins: Sequence[ArmsByTask]) -> dict[str, Measured | ByTask]:
    result: dict[str, Measured | ByTask] = {**over_twins([_by_statistic(one) for one in twins])}
    result["transition_spread"] = over_seeds([_spread(twin, n_blocks) for twin in twins])
    for name in (*CONTROLS, "content_margin", "same_answer_disturbance", "width_gap"):
        result[name] = dict.fromkeys(twins[0], _TRAINED_ONLY)
    return result
