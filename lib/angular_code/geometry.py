"""Geometry of representations beside the divergence of predictions, at every block.

What is compared are items: contexts, or prompts of a task. Prompts of different templates differ in
everything, so only pairs within a template are compared; and the prompts of one subject are not
independent of each other, so they form one unit that the bootstrap draws whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.engine.extraction import tokenize
from lib.engine.models import Decoder
from lib.engine.store import recall_residuals
from lib.evidence.tasks import Task, gate, load_contexts, load_task, task_names
from lib.science import metrics
from lib.science.divergences import jeffreys_of_logits, lens_divergences

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CONTEXTS = "contexts"
MINIMUM_UNITS = 5
"""Fewest prompts of a template that are compared: ten pairs."""


@dataclass(frozen=True, eq=False)
class Items:
    """Texts that are compared with each other.

    Attributes:
        task: the task's name, or ``contexts``.
        texts: what the model reads.
        tokens: token ids of each.
        strata: ``[n_items]``; only pairs within a stratum (a template) are compared.
        units: ``[n_items]``, 0 … n_units − 1; items of a unit (a subject) are drawn together.
        labels: a short name for each.
        answers: the right answer to each; the label where there is none.
    """

    task: str
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    strata: IntArray
    units: IntArray
    labels: tuple[str, ...]
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that all attributes speak of the same items."""
        if not self.answers:
            object.__setattr__(self, "answers", self.labels)
        parts = (self.texts, self.tokens, self.strata, self.units, self.answers)
        lengths = {len(part) for part in parts}
        if lengths != {len(self.labels)}:
            raise ValueError(f"{self.task}: the items' attributes differ in length.")

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.texts)

    @property
    def n_units(self) -> int:
        """Number of independent units, the bootstrap's sample size."""
        return int(self.units.max()) + 1

    def select(self, kept: ArrayLike, *, task: str | None = None) -> Items:
        """Return the items where ``kept`` (bool ``[n_items]``) is true, units numbered anew."""
        rows = np.flatnonzero(np.asarray(kept, dtype=bool))
        return Items(
            task=task or self.task,
            texts=tuple(self.texts[row] for row in rows),
            tokens=tuple(self.tokens[row] for row in rows),
            strata=self.strata[rows],
            units=np.unique(self.units[rows], return_inverse=True)[1].astype(np.int64),
            labels=tuple(self.labels[row] for row in rows),
            answers=tuple(self.answers[row] for row in rows),
        )


def context_items(decoder: Decoder, n_contexts: int | None = None) -> Items:
    """Return the book's contexts, the kinds of text in equal parts.

    Args:
        decoder: whose tokenizer to use.
        n_contexts: how many, all by default.

    Raises:
        ValueError: as `lib.evidence.tasks.load_contexts`.
    """
    table = load_contexts(n_contexts)
    return items_of_texts(decoder, table["context"].tolist(), labels=table["kind"].tolist())


def items_of_texts(
    decoder: Decoder, texts: Sequence[str], *, labels: Sequence[str], task: str = CONTEXTS
) -> Items:
    """Return texts that are all compared with each other, each a unit of its own."""
    return Items(
        task=task,
        texts=tuple(texts),
        tokens=tuple(tuple(ids) for ids in tokenize(decoder, texts)),
        strata=np.zeros(len(texts), dtype=np.int64),
        units=np.arange(len(texts)),
        labels=tuple(labels),
    )


def task_items(task: Task, correct: ArrayLike) -> Items:
    """Return a task's prompts that were answered correctly, compared within their template.

    A template with fewer than `MINIMUM_UNITS` of them is left out.

    Args:
        task: the task.
        correct: bool ``[n_prompts]``.

    Raises:
        ValueError: no template has enough prompts.
    """
    prompts = task.prompts
    kept = np.array(correct, dtype=bool)
    for template in prompts["template"].unique():
        rows = (prompts["template"] == template).to_numpy()
        if kept[rows].sum() < MINIMUM_UNITS:
            kept &= ~rows
    if not kept.any():
        raise ValueError(f"fewer than {MINIMUM_UNITS} correctly answered prompts in each template")
    units = (prompts["subject"] + "|" + prompts["group"]).to_numpy()
    return Items(
        task=task.name,
        texts=tuple(prompts["text"]),
        tokens=tuple(tuple(ids) for ids in task.tokens),
        strata=prompts["template"].to_numpy(dtype=np.int64),
        units=np.unique(units, return_inverse=True)[1].astype(np.int64),
        labels=tuple(prompts["subject"]),
        answers=tuple(prompts["answer"]),
    ).select(kept)


def passed_items(
    decoder: Decoder, names: Sequence[str] | None = None
) -> tuple[dict[str, Items], dict[str, str]]:
    """Return the items of each task that the model passes, and the reason for each that it fails.

    A task that the model's tokenizer does not fit, or that too few prompts are left of, has a
    reason as well; it is a state, not an error.

    Args:
        decoder: the model.
        names: tasks, all by default.
    """
    items: dict[str, Items] = {}
    reasons: dict[str, str] = {}
    for name in names or task_names():
        try:
            task = load_task(name, decoder)
            result = gate(decoder, task)
            reasons[name] = result.reason
            if result.testable:
                items[name] = task_items(task, result.correct)
        except ValueError as problem:
            reasons[name] = str(problem)
    return items, reasons


@dataclass(frozen=True, eq=False)
class Geometry:
    """Dissimilarity matrices of items in one model. All float64, ``[n_blocks, n_items, n_items]``.

    Attributes:
        items: what was compared.
        model: the model's name.
        untrained: whether it is the untrained twin.
        states: the residual stream at the last token, float32 ``[n_blocks, n_items, d_model]``.
        angle: θ, radians.
        distance: Euclidean distance d.
        norm: |Δ log r|.
        lens: J_ℓ, Jeffreys divergence of the block's logit lens, nats.
        prediction: J, Jeffreys divergence of the next-token distributions, nats ``[n_items,
            n_items]``.
        predicted: the most probable next token of each item ``[n_items]``.
    """

    items: Items
    model: str
    untrained: bool
    states: NDArray[np.float32]
    angle: FloatArray
    distance: FloatArray
    norm: FloatArray
    lens: FloatArray
    prediction: FloatArray
    predicted: IntArray

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.states)

    def select(self, kept: ArrayLike, *, task: str | None = None) -> Geometry:
        """Return the geometry of the items where ``kept`` is true."""
        rows = np.flatnonzero(np.asarray(kept, dtype=bool))
        square = np.ix_(rows, rows)
        return replace(
            self,
            items=self.items.select(kept, task=task),
            states=self.states[:, rows],
            angle=self.angle[:, square[0], square[1]],
            distance=self.distance[:, square[0], square[1]],
            norm=self.norm[:, square[0], square[1]],
            lens=self.lens[:, square[0], square[1]],
            prediction=self.prediction[square],
            predicted=self.predicted[rows],
        )


def measure_geometry(decoder: Decoder, items: Items, *, description: str | None = None) -> Geometry:
    """Return all dissimilarity matrices of the items' last tokens, at every block.

    Args:
        decoder: the model.
        items: what to compare; at least three.
        description: what a progress display calls this; None shows none.

    Raises:
        ValueError: fewer than three items, a text of one token (position 0 is an attention sink,
            never analysed), a state of norm zero or with a value that is not finite.
    """
    if items.n_items < 3:
        raise ValueError(f"{items.task}: {items.n_items} items; three at least are compared.")
    for text, tokens in zip(items.texts, items.tokens, strict=True):
        if len(tokens) < 2:
            raise ValueError(f"{items.task}: {text!r} is one token; position 0 is not analysed.")
    residuals = recall_residuals(decoder, items.tokens, logits=True, description=description)
    assert residuals.logits is not None
    states, logits = residuals.states.numpy(), residuals.logits.numpy()
    lens = lens_divergences(
        decoder, list(residuals.states), description=description and f"{description}: logit lens"
    )
    return Geometry(
        items=items,
        model=decoder.name,
        untrained=decoder.untrained,
        states=states,
        angle=np.stack([metrics.angles(block) for block in states]),
        distance=np.stack([metrics.distances(block) for block in states]),
        norm=np.stack([metrics.log_norm_differences(block) for block in states]),
        lens=lens,
        prediction=jeffreys_of_logits(logits),
        predicted=logits.argmax(axis=1).astype(np.int64),
    )


def n_components(d_model: int) -> int:
    """Return how many components `variant_angles` takes out: d_model / 100, at least 1."""
    return max(1, round(d_model / 100))


def variant_angles(geometry: Geometry) -> dict[str, FloatArray]:
    """Return θ of states that were changed in three ways, each ``[n_blocks, n_items, n_items]``.

    Angles are dominated by a few directions that all states share, and by a few large dimensions.
    ``centred``: the mean over items taken out. ``without components``: and the first principal
    components, d_model / 100 of them (Mu and Viswanath 2018, arXiv:1702.01417). ``without
    outliers``: the outlier dimensions left out (`lib.science.metrics.outlier_dimensions`).

    Raises:
        ValueError: states that are all equal, or too few items for the components.
    """
    k = n_components(geometry.states.shape[2])
    edits = {
        "centred": metrics.centred,
        "without components": lambda states: metrics.without_components(states, k),
        "without outliers": metrics.without_outlier_dimensions,
    }
    return {
        name: np.stack([metrics.angles(edit(block)) for block in geometry.states])
        for name, edit in edits.items()
    }


def same_last_token(items: Items) -> tuple[int, NDArray[np.bool_]]:
    """Return the most frequent last token of the items and which items end in it.

    The smallest token id of those that are equally frequent.
    """
    last = np.array([tokens[-1] for tokens in items.tokens])
    tokens, counts = np.unique(last, return_counts=True)
    chosen = int(tokens[counts.argmax()])
    return chosen, last == chosen
