"""Causal control: acting on the late geometry moves the prediction, selectively, by direction.

Every statistic that the claim's criteria name, and what stands beside them. All edits are made at
the last token. Units are subjects; of untrained twins, seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lib.engine.edits import ExchangeSubspace, exchange_direction, exchange_norm
from lib.engine.models import Decoder
from lib.engine.sweeps import Sweep
from lib.engine.vectors import held_out_centroids
from lib.evidence.by_task import both, each, over_twins
from lib.evidence.steering import (
    ONE_TEMPLATE,
    RANDOM,
    ROTATE,
    Doses,
    Edited,
    IntArray,
    Steering,
    sweep_edited,
)
from lib.evidence.tasks import Pairs
from lib.evidence.transfer import (
    Transfer,
    Trial,
    choose_pairs,
    measure_transfers,
    needed_prompts,
    read_tasks,
)
from lib.science.curves import late_blocks
from lib.science.estimate import (
    Estimate,
    FloatArray,
    Measured,
    Untested,
    generator,
    of_the_book,
)

CLAIM = "causal-control"
PARTS = ("direction_share", "norm_transfer")
SPANS = ("span_transfer", "complement_transfer")
CONTROL = ("rotation_flips", "null_flips", "selective_share", "selective_beyond_random")
LEAST_WHOLE = 0.1
"""T of the whole state below which no share of it is spoken of."""
N_DRAWN = 20
"""Covariance-matched directions a pair."""
MOST_ANSWERS, MOST_DIRECTIONS = 9, 8
"""Spans are judged on tasks of at most nine answers, whose differences span eight directions."""
NULLS = ("another answer", "another task", "covariance matched")
_TRAINED_ONLY = Untested("needs right answers, which untrained twins do not give")
_NOT_ON_TWINS = Untested("centroids of all prompts are fitted on the trained model alone")

Found = TypeVar("Found")
Statistics = dict[str, dict[str, Measured]]
Trials = Mapping[str, Trial | Untested]
States = Mapping[str, Tensor]
"""By name, the states `[n_blocks, n_pairs, d_model]` that are put in the recipients' place."""


# --- blocks and pairs -----------------------------------------------------------------------------


def control_block(n_blocks: int, transition: float) -> int:
    """Return the block after the transition, ⌊ℓ*⌋ + 1; at most L − 2."""
    return min(int(transition) + 1, n_blocks - 2)


def thinned_late_blocks(n_blocks: int, transition: float) -> list[int]:
    """Return every second late block, from L − 2 down."""
    return list(late_blocks(n_blocks, transition))[::-2][::-1]


def few_pairs(trial: Trial, most: int | None = None) -> Pairs | Untested:
    """Return one pair a subject, or `most` of them, spread evenly."""
    pairs = choose_pairs(trial)
    return pairs if isinstance(pairs, Untested) or most is None else pairs.thin(most)


# --- transfer of parts of a state -----------------------------------------------------------------


def measure_edited(
    trials: Trials,
    pairs: Mapping[str, Pairs | Untested],
    edited: Mapping[str, States | Untested],
    blocks: Sequence[int],
) -> dict[str, dict[str, Transfer] | Untested]:
    """Return by task what states put in the recipients' place do, by name; one sweep of all tasks.

    Args:
        trials: tasks as one model reads them.
        pairs: recipients and the donors whose prediction is to come through.
        edited: what is put in.
        blocks: after which.
    """
    whole: dict[str, Pairs] = {}
    given: dict[str, Tensor] = {}
    for name, states in edited.items():
        own = pairs[name]
        if not (isinstance(states, Untested) or isinstance(own, Untested)):
            whole[name] = own.where(np.tile(np.arange(len(own)), len(states)))
            given[name] = torch.cat(list(states.values()), dim=1)
    able = {name: trial for name, trial in trials.items() if isinstance(trial, Trial)}
    found = measure_transfers(able, whole, "last", donors=given, blocks=blocks)
    return {
        name: states if isinstance(states, Untested) else _apart(found[name], list(states))
        for name, states in edited.items()
    }


def _apart(whole: Transfer, names: Sequence[str]) -> dict[str, Transfer]:
    """Return the parts of a transfer whose pairs were repeated once a name."""
    n = whole.after.shape[1] // len(names)
    return {name: whole.where(slice(k * n, (k + 1) * n)) for k, name in enumerate(names)}


def measure_parts(
    trials: Trials, pairs: Mapping[str, Pairs | Untested], blocks: Sequence[int]
) -> dict[str, dict[str, Transfer] | Untested]:
    """Return by task what the donor's whole state, its direction and its norm do, each alone."""

    def parts_of(own: Pairs, trial: Trial) -> States:
        states = trial.states("last")[list(blocks)]
        mine, given = (states[:, torch.as_tensor(side)] for side in own.prompts.T)
        return {
            "whole": given,
            "direction": exchange_direction(mine, given),
            "norm": exchange_norm(mine, given),
        }

    return measure_edited(trials, pairs, both(pairs, trials, parts_of), blocks)


def measure_twin(
    twin: Decoder, trials: Trials, blocks: Sequence[int], most: int
) -> dict[str, dict[str, Transfer] | Untested]:
    """Return `measure_parts` of an untrained twin by task, on `most` pairs of each.

    Only the prompts of these pairs are read.
    """
    pairs = each(trials, lambda one: few_pairs(one, most))
    needed = both(pairs, trials, lambda chosen, trial: needed_prompts(trial.task, chosen))
    own = each(needed, lambda one: one[1][0])
    return measure_parts(read_tasks(twin, each(needed, lambda one: one[0])), own, blocks)


def direction_and_norm(parts: Mapping[str, Transfer]) -> dict[str, Measured]:
    """Return `direction_share` and `norm_transfer` over the blocks that were measured."""
    whole, direction, norm = (
        parts[name].estimate().over(range(len(parts[name].blocks)))
        for name in ("whole", "direction", "norm")
    )
    share = direction / whole
    if isinstance(whole, Estimate) and float(whole) < LEAST_WHOLE:
        share = Untested(f"the whole state transfers {float(whole):.2f}, {LEAST_WHOLE} is needed")
    return {"direction_share": share, "norm_transfer": norm}


# --- few dimensions -------------------------------------------------------------------------------


def answer_basis(states: Tensor, answer: IntArray, template: IntArray, held_out: int) -> Tensor:
    """Return orthonormal rows `[k, d_model]` that span the differences of the answers' centroids.

    Principal directions of the centroids, the largest first, at most eight; fitted on all
    templates but one.

    Args:
        states: `[n_prompts, d_model]`.
        answer: of each prompt.
        template: of each prompt.
        held_out: the template that plays no part.
    """
    answers = np.unique(answer[template != held_out])
    held = np.full(len(answers), held_out)
    centroids = held_out_centroids(states[None].double(), answer, template, answers, held)[0]
    _, sizes, rows = torch.linalg.svd(centroids - centroids.mean(dim=0), full_matrices=False)
    rank = int((sizes > sizes[0] * 1e-6).sum())
    return rows[: min(rank, MOST_DIRECTIONS)]


def measure_span(
    trials: Trials, pairs: Mapping[str, Pairs | Untested], block: int
) -> dict[str, dict[str, Transfer] | Untested]:
    """Return by task what exchanging the span of centroid differences does, and what the rest does.

    Names: "span 1", "span 2", … by the number of directions, and "complement" of the largest.
    Each pair's span is fitted on the templates other than its own.
    """
    edited = both(pairs, trials, lambda own, trial: _in_span(trial, own, block))
    return measure_edited(trials, pairs, edited, [block])


def _in_span(trial: Trial, pairs: Pairs, block: int) -> States | Untested:
    """Return the recipients' states with the donors' part in each span, or outside the largest."""
    task = trial.task
    template = task.prompts["template"].to_numpy()
    if len(np.unique(template)) < 2:
        return ONE_TEMPLATE
    states = trial.states("last")[block]
    own, given = (states[torch.as_tensor(side)] for side in pairs.prompts.T)
    held_out = template[pairs.prompts[:, 0]]
    bases = {
        int(one): answer_basis(states, task.answer_index, template, int(one))
        for one in np.unique(held_out)
    }
    k = min(len(basis) for basis in bases.values())
    kinds = {f"span {size}": (size, False) for size in range(1, k + 1)}
    kinds["complement"] = (k, True)
    edited = {}
    for name, (size, complement) in kinds.items():
        edited[name] = torch.empty_like(own)[None]
        for one, basis in bases.items():
            rows = torch.as_tensor(np.flatnonzero(held_out == one))
            edit = ExchangeSubspace(basis[:size], complement)
            edited[name][0, rows] = edit(own[rows], given[rows])
    return edited


def largest_span(spans: Mapping[str, Transfer]) -> str:
    """Return the name of the largest span that was exchanged."""
    return [name for name in spans if name != "complement"][-1]


def few_dimensions(trial: Trial, spans: Mapping[str, Transfer]) -> dict[str, Measured] | Untested:
    """Return `span_transfer` and `complement_transfer`, judged on tasks of at most nine answers."""
    if (n := len(trial.task.answers)) > MOST_ANSWERS:
        return Untested(f"{n} answers; it is judged on tasks of at most {MOST_ANSWERS}")
    exchanged = (spans[largest_span(spans)], spans["complement"])
    return {name: one.estimate().at(0) for name, one in zip(SPANS, exchanged, strict=True)}


# --- rotations and their nulls --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Control:
    """What is chosen after rotations the whole way, to the target or to what a null puts there.

    Attributes:
        steering: of which pairs.
        rotation: the answer chosen `[n_pairs]`.
        nulls: the same by null `[n_draws, n_pairs]`, or why there are none.
        aimed: the third answer that the null "another answer" steers to `[n_pairs]`.
    """

    steering: Steering
    rotation: IntArray
    nulls: Mapping[str, IntArray] | Untested
    aimed: IntArray

    def flips(self) -> Measured:
        """Return the share of recipients that choose their target."""
        return self.steering.mean((self.rotation == self.steering.target).astype(float), share=True)

    def null_flips(self) -> Measured:
        """Return each null's flips to the target beyond chance `[n_nulls]`.

        It is a share of subjects less what chance takes off; where nobody flips and chance is 0,
        its interval is the exact one of a share.
        """
        if isinstance(self.nulls, Untested):
            return self.nulls
        excess = []
        for name, draws in self.nulls.items():
            aimed = self.aimed if name == "another answer" else np.full_like(self.aimed, -1)
            excess.append(np.mean([self.beyond_chance(one, aimed) for one in draws], axis=0))
        return self.steering.mean(np.stack(excess), share=True)

    def beyond_chance(self, choice: IntArray, aimed: IntArray) -> FloatArray:
        """Return flips to the target less those expected without regard to it `[n_pairs]`.

        Of a choice c that is neither the source s nor the answer a that was aimed at, the chance is
        the share of c among the task's targets other than s and a.

        Args:
            choice: the answer chosen `[n_pairs]`.
            aimed: the answer that was aimed at, −1 for none `[n_pairs]`.
        """
        source, target = self.steering.source, self.steering.target
        n_targets = np.bincount(target, minlength=len(self.steering.trial.task.answers))
        aimed_at = np.where(aimed >= 0, n_targets[aimed], 0)
        possible = n_targets.sum() - n_targets[source] - aimed_at
        free = (choice != source) & (choice != aimed)
        chance = np.where(free, n_targets[choice] / np.maximum(possible, 1), 0.0)
        return np.asarray((choice == target) - chance, dtype=np.float64)


def measure_control(
    steerings: Mapping[str, Steering | Untested],
) -> dict[str, Control | Untested]:
    """Return by task what rotations to the target and to the nulls do, in one sweep of all tasks.

    The centroids of another task are those of `find_stranger`.
    """
    drawn = each(steerings, lambda one: _draw_nulls(one, find_stranger(one, steerings)))

    def turned(one: _Drawn) -> Edited:
        own = one.steering
        return own, [exchange_direction(own.own, vector) for vector in one.vectors], None

    def read(one: _Drawn, sweep: Sweep) -> Control:
        chosen = sweep.logits[0, 0].argmax(-1).reshape(-1, len(one.steering.pairs))
        parts = (chosen[1:2], chosen[2:3], chosen[3:])
        nulls = one.reason or dict(zip(NULLS, parts, strict=True))
        return Control(one.steering, chosen[0], nulls, one.aimed)

    return both(drawn, sweep_edited(each(drawn, turned), "rotation"), read)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What a task's states are turned towards: the targets' centroids, then those of the nulls."""

    steering: Steering
    vectors: Sequence[Tensor]
    aimed: IntArray
    reason: Untested | None


def _draw_nulls(steering: Steering, stranger: Steering | Untested) -> _Drawn:
    rng = generator("nulls", steering.trial.task.name)
    aimed = _third_answers(steering, rng)
    reason = next((one for one in (aimed, stranger) if isinstance(one, Untested)), None)
    vectors = [steering.centroid(steering.target)]
    if isinstance(aimed, Untested):
        aimed = np.full(len(steering.pairs), -1)
    elif isinstance(stranger, Steering):
        strangers = stranger.centroid(stranger.target)
        drawn = rng.integers(len(strangers), size=len(steering.pairs))
        vectors += [steering.centroid(aimed), strangers[torch.as_tensor(drawn)]]
        vectors += [_matched(steering, rng) for _ in range(N_DRAWN)]
    return _Drawn(steering, vectors, aimed, reason)


def _third_answers(steering: Steering, rng: np.random.Generator) -> IntArray | Untested:
    result = []
    for template, source, target in zip(
        steering.template, steering.source, steering.target, strict=True
    ):
        others = np.setdiff1d(np.flatnonzero(steering.known[template]), [source, target])
        if len(others) == 0:
            return Untested("no third answer to steer to")
        result.append(int(rng.choice(others)))
    return np.array(result, dtype=np.int64)


def _matched(steering: Steering, rng: np.random.Generator) -> Tensor:
    """Return vectors with mean and covariance of the answers' centroids `[n_pairs, d_model]`."""
    result = torch.empty_like(steering.own)
    for template in np.unique(steering.template):
        rows = np.flatnonzero(steering.template == template)
        own = steering.centroids[int(template)][torch.as_tensor(steering.known[template])].double()
        noise = torch.as_tensor(rng.standard_normal((len(rows), len(own)))) / np.sqrt(len(own) - 1)
        drawn = own.mean(dim=0) + noise @ (own - own.mean(dim=0))
        result[torch.as_tensor(rows)] = drawn.to(result)
    return result


def find_stranger(
    steering: Steering, steerings: Mapping[str, Steering | Untested]
) -> Steering | Untested:
    """Return the book's next task, in a circle by name, that has no answer of this one."""
    name, answers = steering.trial.task.name, set(steering.trial.task.answer_ids.tolist())
    names = sorted(of_the_book(steerings))
    for other in [one for one in names if one > name] + [one for one in names if one < name]:
        found = steerings[other]
        if isinstance(found, Steering) and not answers & set(found.trial.task.answer_ids.tolist()):
            return found
    return Untested("no other task without an answer in common")


# --- all of them ----------------------------------------------------------------------------------


def flips(control: Control) -> dict[str, Measured]:
    """Return `rotation_flips` and `null_flips` of a task."""
    return {"rotation_flips": control.flips(), "null_flips": control.null_flips()}


def selectivity(doses: Doses) -> dict[str, Measured]:
    """Return `selective_share` and `selective_beyond_random` of a task."""
    own = doses.share_at_half(ROTATE)
    return {
        "selective_share": own,
        "selective_beyond_random": own - doses.share_at_half(RANDOM, dose_of=ROTATE),
    }


def statistics(
    parts: Mapping[str, Mapping[str, Transfer] | Untested],
    spans: Mapping[str, Mapping[str, Measured] | Untested],
    control: Mapping[str, Control | Untested],
    doses: Mapping[str, Doses | Untested],
) -> Statistics:
    """Return the claim's statistics, by name and task.

    Args:
        parts: `measure_parts` by task.
        spans: `few_dimensions` by task.
        control: `measure_control` by task.
        doses: `measure_doses` by task.
    """
    return {
        **_of(PARTS, parts, direction_and_norm),
        **_of(SPANS, spans, dict),
        **_of(CONTROL[:2], control, flips),
        **_of(CONTROL[2:], doses, selectivity),
    }


def _of(
    names: Sequence[str],
    found: Mapping[str, Found | Untested],
    function: Callable[[Found], dict[str, Measured]],
) -> Statistics:
    """Return a function's statistics by name and task; untested where nothing was found."""
    own = each(found, function)
    return {name: each(own, itemgetter(name)) for name in names}


def twin_statistics(
    twins: Sequence[Mapping[str, Mapping[str, Transfer] | Untested]],
) -> Statistics:
    """Return the statistics of untrained twins, means over seeds.

    What needs right answers is untested.

    Args:
        twins: `measure_parts` by task, of each seed.
    """
    return {
        **{name: dict.fromkeys(twins[0], _NOT_ON_TWINS) for name in SPANS},
        **{name: dict.fromkeys(twins[0], _TRAINED_ONLY) for name in CONTROL},
        **over_twins([_of(PARTS, twin, direction_and_norm) for twin in twins]),
    }
