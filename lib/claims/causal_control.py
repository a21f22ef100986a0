"""Causal control: acting on the late geometry moves the prediction, selectively, by direction.

Every statistic that the claim's criteria name, and what stands beside them. All edits are made at
the last token. An edited state is computed beforehand, so that any number of edits share one pass
over their prompts. Units are subjects; of untrained twins, seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib.engine.edits import (
    ExchangeSubspace,
    Rotate,
    Shift,
    angle_degrees,
    exchange,
    exchange_direction,
    exchange_norm,
)
from lib.engine.extraction import tokenize
from lib.engine.models import Decoder
from lib.engine.store import recall_sweeps
from lib.engine.sweeps import Measure, Request, Sweep
from lib.engine.vectors import held_out_centroids, random_directions, unembedding_direction
from lib.evidence.tasks import Pairs, Task, exchange_pairs, load_texts
from lib.evidence.transfer import (
    ROWS_AT_ONCE,
    Transfer,
    Trial,
    choose_pairs,
    measure_transfers,
    needed_prompts,
    read_tasks,
)
from lib.science.curves import late_blocks
from lib.science.estimate import (
    FEWEST_UNITS,
    Estimate,
    Measured,
    Untested,
    generator,
    mean_over_units,
    of_the_book,
    over_seeds,
    sums_by_unit,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
ByTask = Mapping[str, Measured]

CLAIM = "causal-control"
LEAST_WHOLE = 0.1
"""T of the whole state below which no share of it is spoken of."""
N_DRAWN = 20
"""Covariance-matched directions a pair."""
DOSES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)
"""Shares of the angle between a state and its target's centroid."""
HALF = 0.5
MOST_ANSWERS, MOST_DIRECTIONS = 9, 8
"""Spans are judged on tasks of at most nine answers, whose differences span eight directions."""
NULLS = ("another answer", "another task", "covariance matched")
ONE_TEMPLATE = Untested("one template, so no other to fit vectors on")
_TRAINED_ONLY = Untested("needs right answers, which untrained twins do not give")
_NOT_ON_TWINS = Untested("centroids of all prompts are fitted on the trained model alone")


# --- blocks and pairs -----------------------------------------------------------------------------


def control_block(n_blocks: int, transition: float) -> int:
    """Return the block after the transition, ⌊ℓ*⌋ + 1; at most L − 2."""
    return min(int(transition) + 1, n_blocks - 2)


def thinned_late_blocks(n_blocks: int, transition: float) -> list[int]:
    """Return every second late block, from L − 2 down."""
    return list(late_blocks(n_blocks, transition))[::-2][::-1]


Trials = Mapping[str, Trial | Untested]
Found = TypeVar("Found")
Result = TypeVar("Result")


def each(
    found: Mapping[str, Found | Untested], function: Callable[[Found], Result | Untested]
) -> dict[str, Result | Untested]:
    """Return a function of every task's entry; what is untested stays so."""
    return {
        name: one if isinstance(one, Untested) else function(one) for name, one in found.items()
    }


def _with(
    found: Mapping[str, Found | Untested],
    swept: Mapping[str, Sweep],
    function: Callable[[Found, Sweep], Result],
) -> dict[str, Result | Untested]:
    """Return a function of every task's entry and its sweep; what is untested stays so."""
    return {
        name: one if isinstance(one, Untested) else function(one, swept[name])
        for name, one in found.items()
    }


def few_pairs(trial: Trial, most: int | None = None) -> Pairs | Untested:
    """Return one pair a subject, or `most` of them, spread evenly."""
    pairs = choose_pairs(trial)
    return pairs if isinstance(pairs, Untested) or most is None else pairs.thin(most)


# --- transfer of parts of a state -----------------------------------------------------------------


Edited = Mapping[str, Tensor]
"""By name, the states `[n_blocks, n_pairs, d_model]` that are put in the recipients' place."""


def measure_edited(
    trials: Trials,
    pairs: Mapping[str, Pairs | Untested],
    edited: Mapping[str, Edited | Untested],
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
    found = measure_transfers(able, whole, "last", edit=exchange, donors=given, blocks=blocks)
    return {
        name: states if isinstance(states, Untested) else _apart(found[name], list(states))
        for name, states in edited.items()
    }


def _apart(whole: Transfer, names: Sequence[str]) -> dict[str, Transfer]:
    """Return the parts of a transfer whose pairs were repeated once a name."""
    n = whole.after.shape[1] // len(names)
    parts = {name: slice(place * n, (place + 1) * n) for place, name in enumerate(names)}
    return {
        name: replace(
            whole,
            after=whole.after[:, own],
            before=whole.before[own],
            choice=whole.choice[:, own],
            target=whole.target[own],
            unit=whole.unit[own],
        )
        for name, own in parts.items()
    }


def measure_parts(
    trials: Trials, pairs: Mapping[str, Pairs | Untested], blocks: Sequence[int]
) -> dict[str, dict[str, Transfer] | Untested]:
    """Return by task what the donor's whole state, its direction and its norm do, each alone."""

    def parts_of(name: str, own: Pairs | Untested) -> Edited | Untested:
        trial = trials[name]
        if isinstance(trial, Untested):
            return trial
        if isinstance(own, Untested):
            return own
        states = trial.states("last")[list(blocks)]
        mine, given = (states[:, torch.as_tensor(side)] for side in own.prompts.T)
        return {
            "whole": given,
            "direction": exchange_direction(mine, given),
            "norm": exchange_norm(mine, given),
        }

    edited = {name: parts_of(name, own) for name, own in pairs.items()}
    return measure_edited(trials, pairs, edited, blocks)


def measure_twin(
    twin: Decoder, trials: Trials, blocks: Sequence[int], most: int
) -> dict[str, dict[str, Transfer] | Untested]:
    """Return `measure_parts` of an untrained twin by task, on `most` pairs of each.

    Only the prompts of these pairs are read.
    """
    pairs = each(trials, lambda one: few_pairs(one, most))
    tasks: dict[str, Task | Untested] = {}
    own: dict[str, Pairs | Untested] = {}
    for name, chosen in pairs.items():
        trial = trials[name]
        if isinstance(trial, Untested) or isinstance(chosen, Untested):
            tasks[name] = own[name] = chosen  # type: ignore[assignment]
        else:
            tasks[name], (own[name],) = needed_prompts(trial.task, chosen)
    return measure_parts(read_tasks(twin, tasks), own, blocks)


def direction_and_norm(parts: Mapping[str, Transfer]) -> dict[str, Measured]:
    """Return `direction_share` and `norm_transfer` over the blocks that were measured."""
    whole, direction, norm = (
        parts[name].estimate().over(range(len(parts[name].blocks)))
        for name in ("whole", "direction", "norm")
    )
    share: Measured
    if isinstance(whole, Estimate) and float(whole) < LEAST_WHOLE:
        share = Untested(f"the whole state transfers {float(whole):.2f}, {LEAST_WHOLE} is needed")
    else:
        share = direction / whole
    return {"direction_share": share, "norm_transfer": norm}


# --- few dimensions -------------------------------------------------------------------------------


def answer_basis(
    states: Tensor, answer: NDArray[np.int64], template: NDArray[np.int64], held_out: int
) -> Tensor:
    """Return orthonormal rows `[k, d_model]` that span the differences of the answers' centroids.

    Principal directions of the centroids, the largest first, at most eight; fitted on all
    templates but one.

    Args:
        states: `[n_prompts, d_model]`.
        answer: of each prompt.
        template: of each prompt.
        held_out: the template that plays no part.
    """
    others = template != held_out
    wide = states.double()
    centroids = torch.stack(
        [
            wide[torch.as_tensor(others & (answer == one))].mean(dim=0)
            for one in np.unique(answer[others])
        ]
    )
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
    edited = {name: _in_span(trials[name], own, block) for name, own in pairs.items()}
    return measure_edited(trials, pairs, edited, [block])


def _in_span(trial: Trial | Untested, pairs: Pairs | Untested, block: int) -> Edited | Untested:
    """Return the recipients' states with the donors' part in each span, or outside the largest."""
    if isinstance(trial, Untested):
        return trial
    if isinstance(pairs, Untested):
        return pairs
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


def few_dimensions(
    trial: Trial | Untested, spans: Mapping[str, Transfer] | Untested
) -> dict[str, Measured]:
    """Return `span_transfer` and `complement_transfer`, judged on tasks of at most nine answers."""
    if isinstance(trial, Untested) or isinstance(spans, Untested):
        reason = trial if isinstance(trial, Untested) else spans
        assert isinstance(reason, Untested)
        return {"span_transfer": reason, "complement_transfer": reason}
    if (n := len(trial.task.answers)) > MOST_ANSWERS:
        many = Untested(f"{n} answers; it is judged on tasks of at most {MOST_ANSWERS}")
        return {"span_transfer": many, "complement_transfer": many}
    return {
        "span_transfer": spans[largest_span(spans)].estimate().at(0),
        "complement_transfer": spans["complement"].estimate().at(0),
    }


# --- steering to an answer ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Steering:
    """What a task's rightly answered prompts are steered with, after one block.

    Attributes:
        trial: the task and the model.
        block: after which they are steered.
        pairs: recipients, and prompts of their targets; one pair a subject.
        own: the recipients' states `[n_pairs, d_model]`.
        centroids: mean state of each answer's rightly answered prompts, one template left out
            `[n_templates, n_answers, d_model]`; zero where there is none.
        known: where there is one `[n_templates, n_answers]`.
        template: index of each pair's template in `centroids` `[n_pairs]`.
    """

    trial: Trial
    block: int
    pairs: Pairs
    own: Tensor
    centroids: Tensor
    known: NDArray[np.bool_]
    template: IntArray

    @property
    def source(self) -> IntArray:
        """The recipients' answer `[n_pairs]`."""
        return self.trial.task.answer_index[self.pairs.prompts[:, 0]]

    @property
    def target(self) -> IntArray:
        """The answer that they are steered to `[n_pairs]`."""
        return self.trial.task.answer_index[self.pairs.prompts[:, 1]]

    def centroid(self, answers: IntArray) -> Tensor:
        """Return the held-out centroid of an answer for each pair `[n_pairs, d_model]`."""
        return self.centroids[torch.as_tensor(self.template), torch.as_tensor(answers)]

    def thin(self, most: int) -> Steering:
        """Return the steering of `most` of the pairs, spread evenly."""
        return self.where(self.pairs.spread(most))

    def where(self, kept: NDArray[np.int64]) -> Steering:
        """Return the steering of some of the pairs, by index `[n_kept]`."""
        return replace(
            self,
            pairs=self.pairs.where(kept),
            own=self.own[torch.as_tensor(kept)],
            template=self.template[kept],
        )

    def held(self) -> Measured:
        """Return the probability that the right answer's token has before any edit, the mean."""
        rows = torch.as_tensor(self.pairs.prompts[:, 0])
        p = torch.softmax(self.trial.logits[rows].double(), dim=-1)
        tokens = torch.as_tensor(self.trial.task.answer_ids[self.source])
        return self.mean(p[torch.arange(len(rows)), tokens].numpy())

    def mean(self, values: FloatArray, *, share: bool = False) -> Measured:
        """Return the mean over subjects of numbers of pairs `[..., n_pairs]`."""
        units, unit = np.unique(self.pairs.unit, return_inverse=True)
        sums = sums_by_unit(values, unit, len(units))
        counts = np.bincount(unit).reshape(-1, *[1] * (sums.ndim - 1))
        name = f"rightly answered {self.trial.task.units}"
        return mean_over_units(sums / counts, name, share=share)


def prepare_steering(trial: Trial, block: int) -> Steering | Untested:
    """Return the pairs of a task that can be steered and the vectors; Untested below the gate."""
    if trial.gate is not None:
        return trial.gate
    task = trial.task
    template = task.prompts["template"].to_numpy()
    names, place = np.unique(template, return_inverse=True)
    if len(names) < 2:
        return ONE_TEMPLATE
    states, right = trial.states("last")[block], trial.correct
    known = np.array(
        [
            [
                bool((right & (place != held) & (task.answer_index == one)).any())
                for one in range(len(task.answers))
            ]
            for held in range(len(names))
        ]
    )
    held, answers = np.nonzero(known)
    if len(held) == 0:
        return Untested("no answer is given rightly")
    centroids = torch.zeros(len(names), len(task.answers), states.shape[-1])
    centroids[held, answers] = held_out_centroids(
        states[None], task.answer_index, place, answers, held, right
    )[0]
    pairs = exchange_pairs(task, n_donors=1, groups=trial.able_groups)
    x, y = pairs.prompts.T
    source, target = task.answer_index[x], task.answer_index[y]
    kept = np.flatnonzero(right[x] & known[place[x], source] & known[place[x], target])
    if (n_units := len(np.unique(pairs.unit[kept]))) < FEWEST_UNITS:
        return Untested(f"{n_units} subjects that can be steered")
    pairs = pairs.where(kept)
    x = pairs.prompts[:, 0]
    return Steering(trial, block, pairs, states[torch.as_tensor(x)], centroids, known, place[x])


def sweep_edited(
    asked: Mapping[str, tuple[Steering, Tensor, IntArray, Measure | None]], description: str
) -> dict[str, Sweep]:
    """Return by task the sweep in which edited states take their recipients' place.

    Args:
        asked: the steering, the states `[n_rows, d_model]`, each row's pair `[n_rows]`, and what
            is measured beside the logits of the answers.
        description: what a progress display calls this.
    """
    if not asked:
        return {}
    first = next(iter(asked.values()))[0]
    requests = {
        name: Request(
            steering.trial.task.tokens,
            np.stack([steering.pairs.prompts[pair, 0], np.arange(len(pair))], axis=1),
            "last",
            states[None],
            steering.trial.task.answer_ids.tolist(),
            measure,
        )
        for name, (steering, states, pair, measure) in asked.items()
    }
    return recall_sweeps(
        first.trial.decoder,
        requests,
        {"exchange": exchange},
        blocks=[first.block],
        description=description,
    )


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
    asked = {}
    for name, one in drawn.items():
        if not isinstance(one, Untested):
            own, n = one.steering, len(one.steering.pairs)
            edited = torch.cat([exchange_direction(own.own, vector) for vector in one.vectors])
            asked[name] = (own, edited, np.tile(np.arange(n), len(one.vectors)), None)
    swept = sweep_edited(asked, "rotation")

    def read(one: _Drawn, sweep: Sweep) -> Control:
        chosen = sweep.logits[0, 0].argmax(-1).reshape(-1, len(one.steering.pairs))
        parts = (chosen[1:2], chosen[2:3], chosen[3:])
        nulls = one.reason or dict(zip(NULLS, parts, strict=True))
        return Control(one.steering, chosen[0], nulls, one.aimed)

    return _with(drawn, swept, read)


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


# --- doses ----------------------------------------------------------------------------------------


def _random_plane(steering: Steering) -> Tensor:
    rng = generator("random plane", steering.trial.task.name)
    seeded = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return random_directions(steering.own, seeded)


def _logit_gradient(steering: Steering) -> Tensor:
    trial = steering.trial
    targets, sources = (trial.task.answer_ids[of] for of in (steering.target, steering.source))
    return unembedding_direction(trial.decoder, steering.own, targets.tolist(), sources.tolist())


def _to_centroid(steering: Steering) -> Tensor:
    return steering.centroid(steering.target)


def _to_donor(steering: Steering) -> Tensor:
    donors = torch.as_tensor(steering.pairs.prompts[:, 1])
    return steering.trial.states("last")[steering.block, donors]


def _difference(steering: Steering) -> Tensor:
    return steering.centroid(steering.target) - steering.centroid(steering.source)


ROTATE, RANDOM = "rotate to centroid", "rotate in a random plane"
METHODS: Mapping[str, tuple[type[Rotate] | type[Shift], Callable[[Steering], Tensor]]] = {
    ROTATE: (Rotate, _to_centroid),
    RANDOM: (Rotate, _random_plane),
    "rotate by difference": (Rotate, _difference),
    "add centroid": (Shift, _to_centroid),
    "add difference": (Shift, _difference),
    "logit edit": (Shift, _logit_gradient),
    "rotate to donor": (Rotate, _to_donor),
}
"""Ways to steer, each an edit and the vector it takes; at one dose all move a state equally far."""


@dataclass(frozen=True, eq=False)
class ProbabilityMoved:
    """The measure of a sweep: what happened to the next token's probabilities.

    Attributes:
        clean_logits: unedited next-token logits `[n_recipients, d_vocab]`.
        recipient: index into them of each row `[n_rows]`.
        source: the token of the recipient's answer `[n_rows]`.
        target: the token of the target's `[n_rows]`.
    """

    clean_logits: Tensor
    recipient: IntArray
    source: IntArray
    target: IntArray

    def __call__(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        """Return `gained` Δp_target, `lost` −Δp_source and `moved`, the total variation.

        Each `[n_rows]`, float64, of edited logits `[n_rows, d_vocab]`.
        """
        parts = [
            self._moved(logits[rows], pair[rows].cpu().numpy())
            for rows in torch.arange(len(pair)).split(ROWS_AT_ONCE)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _moved(self, logits: Tensor, row: IntArray) -> dict[str, Tensor]:
        before = torch.softmax(self.clean_logits[torch.as_tensor(self.recipient[row])].double(), -1)
        change = torch.softmax(logits.double().cpu(), -1) - before
        at = torch.arange(len(row))
        return {
            "gained": change[at, torch.as_tensor(self.target[row])],
            "lost": -change[at, torch.as_tensor(self.source[row])],
            "moved": change.abs().sum(-1) / 2,
        }


@dataclass(frozen=True, eq=False)
class Doses:
    """What graded steering does to each pair, by method `[n_doses, n_pairs]`.

    Attributes:
        steering: of which pairs.
        flipped: whether the target is chosen.
        passed: min(Δp_target, −Δp_source), the probability that went from source to target.
        moved: the total variation between the distributions before and after.
    """

    steering: Steering
    flipped: Mapping[str, FloatArray]
    passed: Mapping[str, FloatArray]
    moved: Mapping[str, FloatArray]

    def share_at_half(self, method: str, *, dose_of: str | None = None) -> Measured:
        """Return Σ passed / Σ moved at the dose at which half of the answers have flipped.

        Args:
            method: whose probabilities.
            dose_of: at which method's dose, its own by default. Untested where that never flips
                half; of draws in which it does not, the largest dose.
        """
        at = dose_of or method
        found = self.steering.mean(
            np.stack([self.flipped[at], self.passed[method], self.moved[method]])
        )
        if isinstance(found, Untested):
            return found
        if (most := float(found.value[0].max())) < HALF:
            return Untested(f"{at}: at most {most:.2f} flip, {HALF} is needed")
        shares = share_at_half(found.draws)
        if not np.isfinite(shares).all():
            return Untested(f"{method}: no probability is moved")
        return replace(found, draws=shares)

    def flip_rate(self, method: str) -> Measured:
        """Return the share of recipients that choose their target at each dose `[n_doses]`."""
        return self.steering.mean(self.flipped[method], share=True)

    def shares(self, method: str) -> Measured:
        """Return Σ passed / Σ moved at each dose `[n_doses]`."""
        found = self.steering.mean(np.stack([self.passed[method], self.moved[method]]))
        return found.at(0) / found.at(1)


def share_at_half(draws: FloatArray) -> FloatArray:
    """Return the share passed of what is moved where a flip curve reaches one half `[n_draws]`.

    Args:
        draws: flip rate, probability passed, probability moved `[n_draws, 3, n_doses]`; at dose 0
            all are 0. Between doses curves are straight lines.
    """
    curves = np.concatenate([np.zeros((*draws.shape[:2], 1)), draws], axis=2)
    reached = curves[:, 0] >= HALF
    after = np.where(reached.any(axis=1), reached.argmax(axis=1), curves.shape[2] - 1)
    row = np.arange(len(curves))
    high, low = curves[row, :, after], curves[row, :, after - 1]
    rise = high[:, 0] - low[:, 0]
    weight = np.where(reached.any(axis=1), (HALF - low[:, 0]) / np.where(rise > 0, rise, 1.0), 1.0)
    passed, moved = (low + weight[:, None] * (high - low))[:, 1:].T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(passed / moved)


def measure_doses(
    steerings: Mapping[str, Steering | Untested],
    methods: Sequence[str] = (ROTATE, RANDOM),
    doses: Sequence[float] = DOSES,
) -> dict[str, Doses | Untested]:
    """Return by task what each method does at each dose, in one sweep of all tasks.

    Raises:
        ValueError: a method that is not in `METHODS`.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"Unknown method {unknown[0]!r}; choose among {', '.join(METHODS)}.")
    asked = {
        name: _graded(one, methods, doses)
        for name, one in steerings.items()
        if isinstance(one, Steering)
    }
    swept = sweep_edited(asked, "doses")

    def read(steering: Steering, sweep: Sweep) -> Doses:
        shape = (len(methods), len(doses), len(steering.pairs))
        chosen = sweep.logits[0, 0].argmax(-1).reshape(shape)
        gained, lost, moved = (
            sweep.measures[name][0, 0].reshape(shape) for name in ("gained", "lost", "moved")
        )
        flipped = (chosen == steering.target).astype(float)
        return Doses(
            steering,
            dict(zip(methods, flipped, strict=True)),
            dict(zip(methods, np.minimum(gained, lost), strict=True)),
            dict(zip(methods, moved, strict=True)),
        )

    return _with(steerings, swept, read)


def _graded(
    steering: Steering, methods: Sequence[str], doses: Sequence[float]
) -> tuple[Steering, Tensor, IntArray, Measure]:
    """Return the states of every method and dose, methods first, for `sweep_edited`."""
    trial, n = steering.trial, len(steering.pairs)
    whole = angle_degrees(steering.own, steering.centroid(steering.target))[:, None]
    edited = []
    for method in methods:
        edit, vector = METHODS[method]
        towards = vector(steering)
        edited += [edit(dose * whole)(steering.own, towards) for dose in doses]
    pair = np.tile(np.arange(n), len(edited))
    recipients, recipient = np.unique(steering.pairs.prompts[:, 0], return_inverse=True)
    ids = trial.task.answer_ids
    measure = ProbabilityMoved(
        trial.logits[torch.as_tensor(recipients)],
        recipient[pair],
        ids[steering.source][pair],
        ids[steering.target][pair],
    )
    return steering, torch.cat(edited), pair, measure


def selectivity(doses: Doses) -> dict[str, Measured]:
    """Return `selective_share` and `selective_beyond_random` of a task."""
    own = doses.share_at_half(ROTATE)
    return {
        "selective_share": own,
        "selective_beyond_random": own - doses.share_at_half(RANDOM, dose_of=ROTATE),
    }


# --- behind ordinary text -------------------------------------------------------------------------


def passages(decoder: Decoder, n_tokens: int, n: int) -> list[str]:
    """Return `n` passages of ordinary text, each of whole texts of one kind, of `n_tokens` or more.

    Of the texts that no verdict rests on. No tokens, an empty passage.
    """
    texts = load_texts("contexts.csv")
    rng = generator("passages", str(n_tokens))
    kinds = [rows for _, rows in texts.groupby("kind")]
    result = []
    for number in range(n):
        rows = kinds[number % len(kinds)]
        passage = ""
        for row in rng.permutation(len(rows)):
            if len(tokenize(decoder, [passage])[0] if passage else []) >= n_tokens:
                break
            passage += f"{rows['context'].iloc[row]} {rows['continuation'].iloc[row]} "
        result.append(passage.strip())
    return result


def measure_behind(
    steerings: Mapping[str, Steering | Untested], before: Sequence[str]
) -> dict[str, dict[str, FloatArray] | Untested]:
    """Return by task which prompts behind text are right unedited, and which flip `[n_pairs]`.

    Vectors are those of the bare prompts of other templates.

    Args:
        steerings: the tasks'.
        before: passages, as many as the largest task has pairs or more; an empty one for none.
    """
    able = {name: one for name, one in steerings.items() if isinstance(one, Steering)}
    requests = {}
    for name, one in able.items():
        trial, n = one.trial, len(one.pairs)
        own = trial.task.prompts["text"].iloc[one.pairs.prompts[:, 0]]
        passage = before[:n]
        texts = [
            f"{text}\n\n{own}" if text else own for text, own in zip(passage, own, strict=True)
        ]
        requests[name] = Request(
            tokenize(trial.decoder, texts),
            np.stack([np.arange(n)] * 2, axis=1),
            "last",
            one.centroid(one.target)[None],
            trial.task.answer_ids.tolist(),
        )
    if not able:
        return {name: one for name, one in steerings.items() if isinstance(one, Untested)}
    first = next(iter(able.values()))
    edits = {"rotation": exchange_direction}
    swept = recall_sweeps(first.trial.decoder, requests, edits, blocks=[first.block])

    def read(one: Steering, sweep: Sweep) -> dict[str, FloatArray]:
        right = sweep.clean_logits.argmax(-1) == one.source
        flipped = sweep.logits[0, 0].argmax(-1) == one.target
        return {
            "right unedited": right.astype(np.float64),
            "flipped": flipped.astype(np.float64),
        }

    return _with(steerings, swept, read)


# --- all of them ----------------------------------------------------------------------------------

Statistics = dict[str, dict[str, Measured]]
PARTS = ("direction_share", "norm_transfer")
SPANS = ("span_transfer", "complement_transfer")
CONTROL = ("rotation_flips", "null_flips", "selective_share", "selective_beyond_random")


def statistics(
    parts: Mapping[str, Mapping[str, Transfer] | Untested],
    spans: Mapping[str, Mapping[str, Measured]],
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
    result: Statistics = {name: {} for name in (*PARTS, *SPANS, *CONTROL)}
    for task, part in parts.items():
        turned, graded = control[task], doses[task]
        own = _of_parts(part) | dict(spans[task])
        if isinstance(turned, Untested):
            own |= dict.fromkeys(CONTROL[:2], turned)
        else:
            own |= {"rotation_flips": turned.flips(), "null_flips": turned.null_flips()}
        if isinstance(graded, Untested):
            own |= dict.fromkeys(CONTROL[2:], graded)
        else:
            own |= selectivity(graded)
        for name, one in own.items():
            result[name][task] = one
    return result


def _of_parts(parts: Mapping[str, Transfer] | Untested) -> dict[str, Measured]:
    return dict.fromkeys(PARTS, parts) if isinstance(parts, Untested) else direction_and_norm(parts)


def twin_statistics(
    twins: Sequence[Mapping[str, Mapping[str, Transfer] | Untested]],
) -> Statistics:
    """Return the statistics of untrained twins, means over seeds.

    What needs right answers is untested.

    Args:
        twins: `measure_parts` by task, of each seed.
    """
    result: Statistics = {
        **{name: dict.fromkeys(twins[0], _NOT_ON_TWINS) for name in SPANS},
        **{name: dict.fromkeys(twins[0], _TRAINED_ONLY) for name in CONTROL},
        **{name: {} for name in PARTS},
    }
    for task in twins[0]:
        found = [_of_parts(twin[task]) for twin in twins]
        for name in PARTS:
            result[name][task] = over_seeds([one[name] for one in found])
    return result
