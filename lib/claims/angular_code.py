"""The angular code: do angles between late states order the divergences of predictions?

Items (texts, or a task's subjects in one template) are compared all with all. ρ is the rank
correlation of a dissimilarity of their states with J, the Jeffreys divergence of the model's own
predictions after them; the unit is the text or the subject, never the pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lib.engine.extraction import iterate_states, logit_lens
from lib.engine.models import Decoder
from lib.engine.store import recall_residuals
from lib.evidence.by_task import each
from lib.evidence.criteria import TEXTS
from lib.evidence.tasks import Task
from lib.evidence.transfer import Trial, read_tasks
from lib.science.correlation import correlate
from lib.science.curves import early_blocks, late_blocks
from lib.science.estimate import (
    FEWEST_DRAWS,
    N_DRAWS,
    Measured,
    Untested,
    generator,
    independent_difference,
    mean_of,
)
from lib.science.geometry import angles, distances, jeffreys_divergence
from lib.science.reader import Reader, fit_reader

FloatArray = NDArray[np.float64]
Dissimilarity = Callable[[ArrayLike], FloatArray]
Statistics = Mapping[str, Mapping[str, Measured]]

CLAIM = "angular-code"
AROUND = 3
"""Blocks before and after the transition that tell whether the relation sets in there."""
TWIN_SUBJECTS = 20
"""Subjects of a task that twins are measured on: a seed is one number, over many tasks."""
RANDOM_DRAWS = 3
ROWS_AT_ONCE = 8192
COMPARED = ("set_in", "beyond_reader")
"""Statistics that the untrained twins' are subtracted from."""


@dataclass(frozen=True)
class Windows:
    """Blocks that count: early, just before and just after the transition ℓ*, and late."""

    early: range
    before: range
    after: range
    late: range


def find_windows(n_blocks: int, transition: float | Untested) -> Windows | Untested:
    """Return the blocks that count; Untested where there is no ℓ*, or too little depth around it.

    After ℓ*: the three blocks from ⌈ℓ*⌉ on. Before: the three below. The last block is in none.
    """
    if isinstance(transition, Untested):
        return transition
    first = math.ceil(transition)
    if first < AROUND or first + AROUND > n_blocks - 1:
        return Untested(
            f"a transition at block {transition:.1f} of {n_blocks} leaves fewer than "
            f"{AROUND} blocks before or after it"
        )
    return Windows(
        early_blocks(n_blocks),
        range(first - AROUND, first),
        range(first, first + AROUND),
        late_blocks(n_blocks, transition),
    )


@dataclass(frozen=True, eq=False)
class Items:
    """What is compared with each other, as one model reads it.

    Attributes:
        states: residual streams at the last token `[n_blocks, n_items, d_model]`.
        divergence: J between the predictions after the last token `[n_items, n_items]`, nats.
        units: what the items are called in estimates.
    """

    states: Tensor
    divergence: FloatArray
    units: str


def read_items(decoder: Decoder, prompts: Sequence[Sequence[int]], units: str) -> Items:
    """Return prompts (token ids) that are all compared with each other, as `decoder` reads them."""
    states = recall_residuals(decoder, prompts, description=units).states
    return Items(states, jeffreys_divergence(logit_lens(decoder, states[-1])), units)


def items_by_template(trial: Trial) -> list[Items] | Untested:
    """Return the prompts of a task, those of each template (and group) compared among themselves.

    Items are the task's subjects, in one order. Groups that lack a subject are left out.
    """
    states, task = trial.states("last"), trial.task
    result = []
    for rows in map(torch.as_tensor, task.cells()):
        logits = logit_lens(trial.decoder, states[-1, rows])
        result.append(Items(states[:, rows], jeffreys_divergence(logits), task.units))
    return result or Untested("no template holds every subject")


def correlate_items(
    parts: Sequence[Items] | Untested,
    dissimilarity: Dissimilarity = angles,
    n_draws: int = N_DRAWS,
) -> Measured:
    """Return ρ of a dissimilarity of states with J at each block, the mean over templates.

    Args:
        parts: one for each template; of texts there is one.
        dissimilarity: of states `[n_items, d_model]`, such as `angles`.
        n_draws: as `correlate`.
    """
    if isinstance(parts, Untested):
        return parts
    curves = [
        correlate(
            [dissimilarity(s) for s in part.states], part.divergence, part.units, n_draws=n_draws
        )
        for part in parts
    ]
    return mean_of(curves)


# --- the fair reader -----------------------------------------------------------------------------


def learn_readers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    blocks: Sequence[int],
    *,
    judged: Sequence[Sequence[int]],
) -> dict[int, Reader]:
    """Return an affine reader for each block, fitted at all tokens of prompts but the first one.

    Args:
        decoder: the model.
        prompts: token ids to learn from.
        blocks: which blocks to read.
        judged: token ids of the texts that the readers will be used on.

    Raises:
        ValueError: a prompt to learn from is judged as well; as `fit_reader`.
    """
    known = {tuple(prompt) for prompt in judged}
    shared = sum(tuple(prompt) in known for prompt in prompts)
    if shared:
        raise ValueError(
            f"{shared} of the texts that readers learn from are judged as well; give others."
        )
    last = decoder.n_blocks - 1
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    places = torch.arange(1, int(ends.max()) + 1)[:, None]
    real = places <= ends
    needed = {*blocks, last}
    states = {block: torch.empty(len(places), len(prompts), decoder.d_model) for block in needed}
    for rows, picked in iterate_states(decoder, prompts, places.minimum(ends), needed):
        for block in needed:
            states[block][:, rows] = picked[block].float().cpu()
    text = np.broadcast_to(np.arange(len(prompts)), real.shape)[real.numpy()]
    target = states[last][real].numpy()
    return {block: fit_reader(states[block][real].numpy(), target, text) for block in blocks}


def read_divergence(decoder: Decoder, states: Tensor, reader: Reader | None = None) -> FloatArray:
    """Return J between the predictions read from a block's states `[n_items, d_model]`, nats.

    By the logit lens, or by a reader before it.
    """
    read = states if reader is None else torch.as_tensor(reader(states), dtype=torch.float32)
    return jeffreys_divergence(logit_lens(decoder, read))


def correlate_beyond(
    items: Items,
    read: Mapping[int, FloatArray],
    blocks: Sequence[int],
    dissimilarity: Dissimilarity = angles,
) -> Measured:
    """Return the partial ρ of a dissimilarity with J given what is read at the same block.

    The mean over `blocks`; `read` holds a matrix J of the read predictions for each of them.
    """
    curve = correlate(
        [dissimilarity(items.states[block]) for block in blocks],
        items.divergence,
        items.units,
        given=[read[block] for block in blocks],
    )
    return curve.over(range(len(blocks)))


# --- one network ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Network:
    """What the geometry of one network says of its own predictions.

    Attributes:
        texts: the texts as it reads them.
        tasks: the tasks as it reads them, a list of templates each.
        angle: ρ(θ, J) at each block, by place: "texts" and the tasks.
        distance: ρ(d, J), the same.
        readers: the affine reader of some blocks.
        read: J between what the reader predicts for the texts, by block.
        lens: J between what the logit lens predicts for them, by block.
    """

    texts: Items
    tasks: Mapping[str, list[Items] | Untested]
    angle: Mapping[str, Measured]
    distance: Mapping[str, Measured]
    readers: Mapping[int, Reader]
    read: Mapping[int, FloatArray]
    lens: Mapping[int, FloatArray]


def measure_network(
    decoder: Decoder,
    texts: Sequence[Sequence[int]],
    tasks: Mapping[str, Task | Untested],
    *,
    learn: Sequence[Sequence[int]],
    reader_blocks: Sequence[int],
) -> Network:
    """Return what the geometry of a network says of its predictions.

    Args:
        decoder: trained or not; each has readers of its own.
        texts: token ids of the texts that are judged.
        tasks: the tasks, or a part of them.
        learn: token ids of the texts that readers learn from.
        reader_blocks: blocks to read.

    Raises:
        ValueError: as `learn_readers`.
    """
    items = read_items(decoder, texts, TEXTS)
    parts = each(read_tasks(decoder, tasks), items_by_template)
    sets: Mapping[str, list[Items] | Untested] = {TEXTS: [items], **parts}
    readers = learn_readers(decoder, learn, reader_blocks, judged=texts)
    n_draws = FEWEST_DRAWS if decoder.untrained else N_DRAWS  # a seed is one number
    return Network(
        items,
        parts,
        {name: correlate_items(found, angles, n_draws) for name, found in sets.items()},
        {name: correlate_items(found, distances, n_draws) for name, found in sets.items()},
        readers,
        {b: read_divergence(decoder, items.states[b], one) for b, one in readers.items()},
        {b: read_divergence(decoder, items.states[b]) for b in readers},
    )


def thin_tasks(tasks: Mapping[str, Task | Untested]) -> dict[str, Task | Untested]:
    """Return the tasks with one template, one group and about `TWIN_SUBJECTS` subjects each."""
    return each(tasks, _thin)


def _thin(task: Task) -> Task:
    kept = np.arange(task.n_units)[:: max(1, task.n_units // TWIN_SUBJECTS)]
    rows = task.prompts
    first = rows[rows["unit"].isin(kept)].sort_values(["template", "group"]).iloc[0]
    rows = rows[
        rows["unit"].isin(kept)
        & (rows["template"] == first["template"])
        & (rows["group"] == first["group"])
    ]
    place = {unit: index for index, unit in enumerate(kept.tolist())}
    return replace(
        task,
        prompts=rows.assign(unit=rows["unit"].map(place)).reset_index(drop=True),
        subjects=tuple(task.subjects[unit] for unit in kept),
    )


# --- the statistics of the claim -----------------------------------------------------------------


def statistics(
    angle: Mapping[str, Measured],
    distance: Mapping[str, Measured],
    beyond_reader: Measured,
    windows: Windows | Untested,
) -> Statistics:
    """Return the claim's statistics on one network, by name and place.

    Args:
        angle: ρ(θ, J) `[n_blocks]` by place: "texts" and the tasks.
        distance: ρ(d, J), the same.
        beyond_reader: of the texts, as `correlate_beyond` returns it.
        windows: the blocks that count; those of the trained model for its twins.
    """
    if isinstance(windows, Untested):
        names = ("late_correlation", "late_minus_early", "set_in", "angle_minus_distance")
        lost = {name: dict.fromkeys(angle, windows) for name in names}
        return {**lost, "beyond_reader": {TEXTS: windows}}
    late = {place: one.over(windows.late) for place, one in angle.items()}
    return {
        "late_correlation": late,
        "late_minus_early": {p: late[p] - one.over(windows.early) for p, one in angle.items()},
        "set_in": {
            p: one.over(windows.after) - one.over(windows.before) for p, one in angle.items()
        },
        "angle_minus_distance": {p: late[p] - distance[p].over(windows.late) for p in late},
        "beyond_reader": {TEXTS: beyond_reader},
    }


def beyond_twins(trained: Statistics, twins: Statistics) -> Statistics:
    """Return what the trained model has of set-in and increment beyond its untrained twins."""
    return {
        f"{name}_beyond_twins": {
            place: independent_difference(one, twins[name][place])
            for place, one in trained[name].items()
        }
        for name in COMPARED
    }


# --- shown beside them ---------------------------------------------------------------------------


def correlate_different(items: Items, labels: ArrayLike) -> Measured:
    """Return ρ(θ, J) at each block over the pairs of items with different labels (answers) alone.

    Args:
        items: of one template.
        labels: one an item `[n_items]`.
    """
    label = np.asarray(labels)
    theta = [angles(states) for states in items.states]
    among = label[:, None] != label[None, :]
    return correlate(theta, items.divergence, items.units, among=among)


def unembedding_basis(decoder: Decoder) -> FloatArray:
    """Return orthonormal directions `[d_model, d_model]`, those that move logits most first.

    Columns are the right singular vectors of the unembedding less its mean row, which moves all
    logits alike and so no prediction.
    """
    parts = np.array_split(np.arange(decoder.d_vocab), -(-decoder.d_vocab // ROWS_AT_ONCE))

    def rows(ids: np.ndarray) -> Tensor:  # all of them in float64 may be as large as the model
        return decoder.unembedding_rows(ids.tolist())[0].detach().double().cpu()

    mean = torch.stack([rows(ids).sum(dim=0) for ids in parts]).sum(dim=0) / decoder.d_vocab
    products = torch.zeros(decoder.d_model, decoder.d_model, dtype=torch.float64)
    for ids in parts:
        centred = rows(ids) - mean
        products += centred.T @ centred
    return torch.linalg.eigh(products).eigenvectors.flip(1).numpy()


def beyond_by_rivals(
    decoder: Decoder, network: Network, blocks: Sequence[int], k: int
) -> dict[str, Measured]:
    """Return the partial ρ with J, given the affine reader, of the angle and of its rivals.

    The rivals are the distance, and angles within the k directions of the state that move logits
    most, within all others, and within k random directions (mean of `RANDOM_DRAWS`).
    """
    basis = unembedding_basis(decoder)
    rng = generator("random directions")
    shape = (RANDOM_DRAWS, decoder.d_model, k)
    random = [np.linalg.qr(one)[0] for one in rng.normal(size=shape)]

    def beyond(dissimilarity: Dissimilarity) -> Measured:
        return correlate_beyond(network.texts, network.read, blocks, dissimilarity)

    return {
        "angle": beyond(angles),
        "distance": beyond(distances),
        f"angle, top {k} of the unembedding": beyond(within(basis[:, :k])),
        "angle, all other directions": beyond(within(basis[:, k:])),
        f"angle, {k} random directions": mean_of([beyond(within(one)) for one in random]),
    }


def within(basis: FloatArray) -> Dissimilarity:
    """Return the angle between states projected onto orthonormal directions `[d_model, k]`."""
    return lambda states: angles(np.asarray(states, dtype=np.float64) @ basis)
