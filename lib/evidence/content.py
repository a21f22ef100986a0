"""Content: what a state has to hold to bring a prediction through.

At the block where each arm carries, states are put in that have no business there, donors of the
same answer, and the prompt's own. Chance is what a state transfers of donors of a third answer.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib.engine.edits import exchange
from lib.engine.extraction import extract_residuals
from lib.engine.readouts import ROWS_AT_ONCE, Distributions, Divergences
from lib.engine.store import recall_sweeps
from lib.engine.sweeps import Request
from lib.engine.vectors import random_directions
from lib.evidence.tasks import Pairs, Task
from lib.evidence.transfer import (
    Arm,
    Trial,
    name_units,
    needed_prompts,
    needed_rows,
)
from lib.science.curves import early_blocks, last_sixth
from lib.science.estimate import (
    FEWEST_UNITS,
    Measured,
    Untested,
    generator,
    is_own,
    means_by_unit,
    ratio_of_sums,
    stack,
    sums_by_unit,
)

CONTROLS = ("random_direction", "covariance_matched", "other_task")
SELVES = 5
"""Prompts of a task that also get their own state, which changes nothing."""


@dataclass(frozen=True)
class Content:
    """What states put in where each arm carries do in one task.

    Attributes:
        transfer: T by what was put in, the donor's state or a control's, [context arm, prediction
            arm] `[2]`.
        beyond_chance: of the controls, the same less what they transfer of donors of a third
            answer, where that is above 0 `[2]`.
        same_answer: disturbance by donors of the same answer over that by the donor `[2]`.
        self_donor: the largest KL(p_x ‖ p_edited), nats, where a prompt is its own donor; of a few.
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
    first = trials[next(iter(pairs))]
    decoder, forests = first.decoder, first.forests
    found: dict[str, list[Content]] = {name: [] for name in small}
    for arm, block in carrying_blocks(decoder.n_blocks).items():
        states = {name: states_at(trial, arm, [block])[0] for name, (trial, _) in small.items()}
        put, asked, alike_asked = {}, {}, {}
        for name, (trial, (own, alike)) in small.items():
            at, others = states[name], states[other_task(name, small)]
            y = torch.as_tensor(own.prompts[:, 1])
            put[name] = {"donor": at[y], **control_states(trial.task, own, at, others, arm)}
            known, toward, *_ = compared[name]
            tiled = {k: np.tile(rows, len(put[name])) for k, rows in toward.items()}
            asked[name] = put_in(trial, known, tiled, torch.cat(list(put[name].values())), arm)
            selves = own.prompts[:SELVES, [0, 0]]
            recipients, donors = np.concatenate([alike.prompts, selves]).T
            same = at[torch.as_tensor(donors)]
            alike_asked[name] = put_in(trial, known, {"recipient": recipients}, same, arm)
        swept, swept_alike = (
            recall_sweeps(decoder, requests, {"edit": exchange}, blocks=[block], forests=forests)
            for requests in (asked, alike_asked)
        )
        for name, (trial, (own, alike)) in small.items():
            what, (*_, before, constant) = put[name], compared[name]
            after = {
                k: dict(zip(what, values[0, 0].reshape(len(what), -1), strict=True))
                for k, values in swept[name].measures.items()
            }
            kept = swept_alike[name].measures["recipient"][0, 0]
            other = after["recipient"]["donor"]
            ratio = disturbance_ratio(trial.task, kept[: len(alike)], alike.unit, other, own.unit)
            own_state = float(kept[len(alike) :].max())
            content = _one_arm(trial.task, own.unit, before, after, constant, ratio, own_state)
            found[name].append(content)
    return {name: _both_arms(*arms) for name, arms in found.items()}


def _one_arm(
    task: Task,
    unit: np.ndarray,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, Mapping[str, np.ndarray]],
    constant: np.ndarray | None,
    same_answer: Measured,
    self_donor: float,
) -> Content:
    """Return what one arm's states do, numbers: KL(p_k ‖ p_edited), nats, by k and what was put in.

    `constant` is what the mean over third answers adds; None where a pair has none.
    """
    near = {
        name: _transfer(task, after["donor"][name], before["donor"], unit)
        for name in ("donor", *CONTROLS)
    }
    lost = Untested(f"{len(task.answers)} answers leave no third one for some pairs")
    beyond: dict[str, Measured] = dict.fromkeys(CONTROLS, lost)
    if constant is not None:
        for name in CONTROLS:
            far = _transfer(task, after["third"][name] + constant, before["third"] + constant, unit)
            beyond[name] = near[name] - far.map(lambda t: np.maximum(t, 0))
    return Content(near, beyond, same_answer, self_donor)


def _both_arms(one: Content, other: Content) -> Content:
    return Content(
        {name: stack(t, other.transfer[name]) for name, t in one.transfer.items()},
        {name: stack(t, other.beyond_chance[name]) for name, t in one.beyond_chance.items()},
        stack(one.same_answer, other.same_answer),
        max(one.self_donor, other.self_donor),
    )


def _transfer(task: Task, after: np.ndarray, before: np.ndarray, unit: np.ndarray) -> Measured:
    """Return T of pairs `[n_pairs]`, drawn over units."""
    below = sums_by_unit(before, unit)
    above = below - sums_by_unit(after, unit)
    return ratio_of_sums(above, below, name_units(task, np.unique(unit)))


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
        means_by_unit(values[np.isin(own, both)], own[np.isin(own, both)])
        for values, own in ((alike, alike_unit), (other, unit))
    )
    return ratio_of_sums(above, below, name_units(task, both))


# --- where, and which prompts ---------------------------------------------------------------------


def carrying_blocks(n_blocks: int) -> Mapping[Arm, int]:
    """Return where each arm carries: the middle early block, the first of the last sixth."""
    early = early_blocks(n_blocks)
    return {"context arm": early[len(early) // 2], "prediction arm": last_sixth(n_blocks)[0]}


def states_at(trial: Trial, arm: Arm, blocks: Sequence[int]) -> Tensor:
    """Return the states that an arm exchanges `[n_blocks, n_prompts, d_model]`.

    At the subject's token the prompts are read up to it: what follows cannot change them.
    """
    if arm == "prediction arm":
        return trial.states("last")[list(blocks)]
    ends = trial.task.subject_positions
    begun = [tokens[: end + 1] for tokens, end in zip(trial.task.tokens, ends, strict=True)]
    return extract_residuals(trial.decoder, begun, blocks=blocks).states


def _narrow(trial: Trial, pairs: Pairs) -> tuple[Trial, list[Pairs]]:
    """Return a trial of only the prompts in use, its pairs, and those of the same answer."""
    alike = same_answer_pairs(trial.task, pairs)
    task, own = needed_prompts(trial.task, pairs, alike)
    states = trial.last_states[torch.as_tensor(needed_rows(pairs, alike))]
    return replace(trial, task=task, last_states=states), own


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


def _cells(task: Task) -> np.ndarray:
    """Return the number of each prompt's template and group `[n_prompts]`."""
    return task.prompts.groupby(["template", "group"]).ngroup().to_numpy()


# --- states without the donor's content -----------------------------------------------------------


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


def other_task(name: str, names: Collection[str]) -> str:
    """Return the task whose states stand in for this one's: chosen by names, not by their order.

    A reader's own task stands in for none of the book's.
    """
    others = [other for other in names if other != name]
    return min(
        [other for other in others if not is_own(other)] or others,
        key=lambda other: generator("other task", name, other).random(),
    )


def put_in(
    trial: Trial, known: Distributions, toward: Mapping[str, np.ndarray], states: Tensor, arm: Arm
) -> Request:
    """Return the request to put states in, and to measure KL(p_k ‖ p_edited), nats, by name.

    Args:
        trial: the task and the model.
        known: the predictions of the task's prompts, and what else p_k may be.
        toward: by name, which of them k is; "recipient" is the prompt that is edited `[n]`.
        states: what is put in `[n, d_model]`.
        arm: where.
    """
    recipients = toward["recipient"]
    return Request(
        trial.task.tokens,
        np.stack([recipients, np.arange(len(recipients))], axis=1),
        trial.task.subject_positions if arm == "context arm" else "last",
        states[None],
        measure=Divergences(known, toward),
    )


# --- what it is compared with ---------------------------------------------------------------------


def _compare(
    trial: Trial, pairs: Pairs
) -> tuple[Distributions, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray | None]:
    """Return what is compared with, its rows by name, and KL(p_k ‖ p_x) before by name, nats.

    And what the mean over third answers adds, `third_answers`; None without them.
    """
    logits = trial.logits
    x, y = pairs.prompts.T
    toward = {"recipient": x, "donor": y, "third": y}
    constant = None
    if (third := third_answers(trial.task, pairs, logits)) is not None:
        toward["third"], constant = len(logits) + np.arange(len(pairs)), third[1]
    known = Distributions.of(logits if third is None else torch.cat([logits, third[0]]))
    found = Divergences(known, toward)(logits[torch.as_tensor(x)], torch.arange(len(x)))
    return known, toward, {name: one.numpy() for name, one in found.items()}, constant


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
    x, y = pairs.prompts.T
    fits = cell == cell[y][:, None]
    fits &= (answer != answer[x][:, None]) & (answer != answer[y][:, None])
    if not fits.any(axis=1).all():
        return None
    log_p = torch.log_softmax(logits.double(), -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    means, constants = [], []
    for weights in torch.as_tensor(fits / fits.sum(axis=1, keepdims=True)).split(ROWS_AT_ONCE):
        mean = weights @ p
        means.append(mean.clamp(min=torch.finfo(mean.dtype).tiny).log().float())  # p may underflow
        constants.append((torch.special.entr(mean).sum(-1) - weights @ entropy).numpy())
    return torch.cat(means), np.concatenate(constants)
