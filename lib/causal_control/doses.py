"""Dose and response: how far a state is turned or shifted, in which way, and what becomes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.causal_control.control import choose_pairs
from lib.causal_control.selectivity import rest_measure
from lib.engine.extraction import Positions
from lib.engine.interventions import exchange
from lib.engine.steering import (
    angle_degrees,
    held_out_centroids,
    rotate,
    shift,
    stretch,
    unembedding_direction,
)
from lib.engine.store import recall_residuals, recall_sweep
from lib.evidence.arms import ARMS, Arm, Trial

METHODS = ("rotation", "additive", "unembedding", "random plane", "radial")
OWN_ANSWER = "own answer"


@dataclass(frozen=True, eq=False)
class DoseOutcome:
    """What each way of steering does to each pair, by dose.

    All arrays are `[n_blocks, n_methods, n_doses + 1, n_pairs]`; the last dose is each pair's full
    angle, the rotation's whole way to the target.

    Attributes:
        trial: task and model.
        arm: where the state was edited.
        pairs: recipient and donor `[n_pairs, 2]`.
        blocks: after which it was edited.
        methods: names of the ways of steering.
        doses: in degrees `[n_doses]`, without the full angle.
        full_angles: θ(h, target) in degrees `[n_blocks, n_pairs]`.
        choice: closed-set argmax, an index into the task's answers.
        measures: readouts of `selectivity.rest_measure`, by name; empty unless asked for.
    """

    trial: Trial
    arm: Arm
    pairs: np.ndarray
    blocks: tuple[int, ...]
    methods: tuple[str, ...]
    doses: tuple[float, ...]
    full_angles: np.ndarray
    choice: np.ndarray
    measures: Mapping[str, np.ndarray]

    def values(self, name: str, block: int, method: str) -> np.ndarray:
        """Return `"flipped"`, `"changed"` or a measure of one block and method by dose and pair.

        `"flipped"`: the answer became the target; `"changed"`: it is no longer the source.
        """
        at = (self.blocks.index(block), self.methods.index(method))
        if name == "flipped":
            return self.choice[at] == self.trial.target[self.pairs[:, 1]]
        if name == "changed":
            return self.choice[at] != self.trial.target[self.pairs[:, 0]]
        return self.measures[name][at]


def measure_doses(
    trials: Mapping[str, Trial],
    blocks: Sequence[int],
    doses: Sequence[float],
    *,
    arm: Arm = "prediction arm",
    donors_per_prompt: int = 2,
    templates: Sequence[int] | None = None,
    methods: Sequence[str] = (*METHODS, OWN_ANSWER),
    full_vocabulary: bool = False,
    seed: int = 0,
) -> dict[str, DoseOutcome]:
    """Return the dose–response of every way of steering, by task.

    Args:
        trials: by task.
        blocks: after which to steer.
        doses: in degrees; the full angle is added.
        arm: the subject's token or the last one.
        donors_per_prompt: targets of each recipient.
        templates: of the recipients, all by default.
        methods: which of them; the rotation gives the full angles and is always there.
        full_vocabulary: also measure what happens to the rest of the distribution.
        seed: of the random planes.
    """
    outcomes = {}
    for number, (name, trial) in enumerate(trials.items()):
        pairs = choose_pairs(trial, donors_per_prompt, templates)
        if len(pairs) == 0:
            continue
        task, n_pairs = trial.task, len(pairs)
        where: Positions = "last" if ARMS[arm] == "last" else task.subject_positions
        found = recall_residuals(
            trial.decoder, task.tokens, positions=where, logits=full_vocabulary
        )
        states = found.states[list(blocks)]
        vectors = steering_vectors(trial, pairs, states, arm=arm, seed=seed + number)
        wanted = [name for name in vectors if name == "rotation" or name in methods]
        start = states[:, pairs[:, 0]]
        full = angle_degrees(start, vectors["rotation"])
        grid = torch.tensor([*doses], dtype=torch.float64)[None, :, None].expand(
            len(blocks), -1, n_pairs
        )
        degrees = torch.cat([grid, full[:, None]], dim=1)[..., None]
        edited = torch.stack(
            [
                steer_states(method, start[:, None], vectors[method][:, None], degrees)
                for method in wanted
            ],
            dim=1,
        )
        shape = edited.shape[1:4]
        rows = np.stack(
            [np.tile(pairs[:, 0], shape[0] * shape[1]), np.arange(np.prod(shape))], axis=1
        )
        measure = None
        if full_vocabulary:
            assert found.logits is not None
            measure = rest_measure(found.logits, pairs[:, 0], trial.target[pairs], task.answer_ids)
        sweep = recall_sweep(
            trial.decoder,
            task.tokens,
            rows,
            {"exchange": exchange},
            positions=where,
            donors=edited.flatten(1, 3),
            blocks=blocks,
            read_ids=task.answer_ids.tolist(),
            measure=measure,
            description=f"{name}: steering, {arm}",
        )
        outcomes[name] = DoseOutcome(
            trial=trial,
            arm=arm,
            pairs=pairs,
            blocks=sweep.blocks,
            methods=tuple(wanted),
            doses=tuple(float(dose) for dose in doses),
            full_angles=full.numpy(),
            choice=sweep.logits[0].argmax(-1).reshape(len(blocks), *shape),
            measures={
                key: values[0].reshape(len(blocks), *shape)
                for key, values in sweep.measures.items()
            },
        )
    return outcomes


def steering_vectors(
    trial: Trial,
    pairs: np.ndarray,
    states: Tensor,
    *,
    arm: Arm = "prediction arm",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return what each way of steering acts with, by method `[n_blocks, n_pairs, d_model]`.

    - `rotation`: the target's centroid over the other templates (the donor's state for a model that
      is judged by its own choice).
    - `additive`: that centroid minus the source's.
    - `unembedding`: `unembedding_direction` from source to target at the recipient's state.
    - `random plane`: a random vector.
    - `radial`: the recipient's state.
    - `own answer`: the *source's* centroid over the other templates, the null of the rotation; not
      for a model that is judged by its own choice.
    """
    recipient, donor = pairs.T
    start = states[:, recipient]
    generator = torch.Generator().manual_seed(seed)
    if trial.own_choice:
        goal, origin = states[:, donor], start
    else:
        prompts = trial.task.prompts
        last = ARMS[arm] == "last"
        labels = trial.target if last else prompts["subject"].factorize()[0]
        template = prompts["template"].to_numpy()
        goal, origin = (
            held_out_centroids(
                states, labels, template, labels[end], template[recipient], trial.usable
            )
            for end in (donor, recipient)
        )
    ids = trial.task.answer_ids[trial.target[pairs]]
    logit = [unembedding_direction(trial.decoder, rows, ids[:, 1], ids[:, 0]) for rows in start]
    vectors = {
        "rotation": goal,
        "additive": goal - origin,
        "unembedding": torch.stack(logit),
        "random plane": torch.randn(start.shape, generator=generator),
        "radial": start,
    }
    return vectors if trial.own_choice else {**vectors, OWN_ANSWER: origin}


def steer_states(method: str, state: Tensor, vector: Tensor, degrees: float | Tensor) -> Tensor:
    """Return states `[..., d_model]` steered by one method at one dose.

    Raises:
        ValueError: no such method; as the edits of `lib.engine.steering`.
    """
    if method in ("rotation", "random plane", OWN_ANSWER):
        return rotate(state, vector, degrees)
    if method in ("additive", "unembedding"):
        return shift(state, vector, degrees)
    if method == "radial":
        return stretch(state, degrees)
    raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
