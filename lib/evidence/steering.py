"""Steering: what turns a task's rightly answered prompts to another answer, and what that does.

Vectors come from the prompts of other templates. All edits are made at the last token. An edited
state is computed beforehand, so that any number of edits share one pass over their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib.engine.edits import Edit, Rotate, Shift, angle_degrees, exchange, exchange_direction
from lib.engine.extraction import tokenize
from lib.engine.models import Decoder
from lib.engine.readouts import Distributions, ProbabilityMoved
from lib.engine.store import recall_sweeps
from lib.engine.sweeps import Measure, Request, Sweep
from lib.engine.vectors import held_out_centroids, random_directions, unembedding_direction
from lib.evidence.by_task import both, each
from lib.evidence.tasks import Pairs, exchange_pairs, load_texts
from lib.evidence.transfer import Trial
from lib.science.estimate import (
    FEWEST_UNITS,
    FloatArray,
    Measured,
    Untested,
    generator,
    mean_over_units,
    means_by_unit,
)

IntArray = NDArray[np.int64]

DOSES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)
"""Shares of the angle between a state and its target's centroid."""
HALF = 0.5
ONE_TEMPLATE = Untested("one template, so no other to fit vectors on")


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

    def where(self, kept: IntArray) -> Steering:
        """Return the steering of some of the pairs, by index `[n_kept]`."""
        return replace(
            self,
            pairs=self.pairs.where(kept),
            own=self.own[torch.as_tensor(kept)],
            template=self.template[kept],
        )

    def held(self) -> Measured:
        """Return the probability that the right answer's token has before any edit, the mean."""
        before, recipient = self.unedited()
        tokens = torch.as_tensor(self.trial.task.answer_ids[self.source])
        return self.mean(before[torch.as_tensor(recipient), tokens].double().numpy())

    def unedited(self) -> tuple[Tensor, IntArray]:
        """Return next-token probabilities after each recipient, and whose each pair's are.

        `[n_recipients, d_vocab]`, float32, and `[n_pairs]`.
        """
        recipients, recipient = np.unique(self.pairs.prompts[:, 0], return_inverse=True)
        return Distributions.of(self.trial.logits_after(recipients)).p, recipient

    def mean(self, values: FloatArray, *, share: bool = False) -> Measured:
        """Return the mean over subjects of numbers of pairs `[..., n_pairs]`."""
        name = f"rightly answered {self.trial.task.units}"
        return mean_over_units(means_by_unit(values, self.pairs.unit), name, share=share)


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
    known = np.zeros((len(names), len(task.answers)), dtype=bool)
    for held_out in range(len(names)):
        known[held_out, task.answer_index[right & (place != held_out)]] = True
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
    x = x[kept]
    own = states[torch.as_tensor(x)]
    return Steering(trial, block, pairs.where(kept), own, centroids, known, place[x])


Edited = tuple[Steering, Sequence[Tensor], Measure | None]
"""A steering, edits of its states, each `[n_pairs, d_model]`, and a measure, if any."""


def sweep_edited(
    edited: Mapping[str, Edited | Untested], description: str
) -> dict[str, Sweep | Untested]:
    """Return by task the sweep in which edited states take their recipients' place.

    Args:
        edited: by task; rows of its sweep are pairs, edit after edit.
        description: what a progress display calls this.
    """

    def request(one: Edited) -> tuple[Steering, Request]:
        steering, states, measure = one
        task, recipient = steering.trial.task, np.tile(steering.pairs.prompts[:, 0], len(states))
        return steering, Request(
            task.tokens,
            np.stack([recipient, np.arange(len(recipient))], axis=1),
            "last",
            torch.cat(list(states))[None],
            task.answer_ids.tolist(),
            measure,
        )

    return _sweep(each(edited, request), {"exchange": exchange}, description)


def _sweep(
    requests: Mapping[str, tuple[Steering, Request] | Untested],
    edits: Mapping[str, Edit],
    description: str | None = None,
) -> dict[str, Sweep | Untested]:
    """Return the sweeps of all tasks, made together, after the block of their steerings."""
    able = {name: one for name, one in requests.items() if not isinstance(one, Untested)}
    swept: dict[str, Sweep] = {}
    if able:
        first = next(iter(able.values()))[0]
        swept = recall_sweeps(
            first.trial.decoder,
            {name: request for name, (_, request) in able.items()},
            edits,
            blocks=[first.block],
            forests=first.trial.forests,
            description=description,
        )
    return {n: one if isinstance(one, Untested) else swept[n] for n, one in requests.items()}


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
    swept = sweep_edited(each(steerings, lambda one: _graded(one, methods, doses)), "doses")

    def read(steering: Steering, sweep: Sweep) -> Doses:
        shape = (len(methods), len(doses), len(steering.pairs))
        chosen = sweep.logits[0, 0].argmax(-1).reshape(shape)
        gained, lost, moved = (
            sweep.measures[name][0, 0].reshape(shape) for name in ("gained", "lost", "moved")
        )
        flipped = (chosen == steering.target).astype(float)
        parts = (flipped, np.minimum(gained, lost), moved)
        return Doses(steering, *(dict(zip(methods, part, strict=True)) for part in parts))

    return both(steerings, swept, read)


def _graded(steering: Steering, methods: Sequence[str], doses: Sequence[float]) -> Edited:
    """Return the states of every method and dose, methods first, for `sweep_edited`."""
    ids = steering.trial.task.answer_ids
    whole = angle_degrees(steering.own, steering.centroid(steering.target))[:, None]
    edited = []
    for method in methods:
        edit, vector = METHODS[method]
        towards = vector(steering)
        edited += [edit(dose * whole)(steering.own, towards) for dose in doses]
    pair = np.tile(np.arange(len(steering.pairs)), len(edited))
    before, recipient = steering.unedited()
    measure = ProbabilityMoved(
        before,
        recipient[pair],
        ids[steering.source][pair],
        ids[steering.target][pair],
    )
    return steering, edited, measure


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

    def request(one: Steering) -> tuple[Steering, Request]:
        task, n = one.trial.task, len(one.pairs)
        prompts = task.prompts["text"].iloc[one.pairs.prompts[:, 0]]
        texts = [
            f"{text}\n\n{prompt}" if text else prompt
            for text, prompt in zip(before[:n], prompts, strict=True)
        ]
        return one, Request(
            tokenize(one.trial.decoder, texts),
            np.stack([np.arange(n)] * 2, axis=1),
            "last",
            one.centroid(one.target)[None],
            task.answer_ids.tolist(),
        )

    def read(one: Steering, sweep: Sweep) -> dict[str, FloatArray]:
        right = sweep.clean_logits.argmax(-1) == one.source
        flipped = sweep.logits[0, 0].argmax(-1) == one.target
        return {"right unedited": right.astype(float), "flipped": flipped.astype(float)}

    swept = _sweep(each(steerings, request), {"rotation": exchange_direction})
    return both(steerings, swept, read)
