"""The norm code: norms carry context that does not determine the prediction.

Every statistic that the claim's criteria name. r is the norm of a residual stream at the last
token; units are texts, subjects and, of untrained twins, seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.engine.edits import (
    Edit,
    Scale,
    TurnLikeNormExchange,
    exchange_direction,
    exchange_norm,
)
from lib.engine.extraction import logit_lens, tokenize
from lib.engine.models import Decoder
from lib.engine.readouts import DistributionMeasure, Distributions, Divergences
from lib.engine.replay import Forest
from lib.engine.store import recall_residuals, recall_sweep
from lib.evidence.by_task import each, measured_by_all
from lib.evidence.criteria import MODEL, TEXTS
from lib.evidence.tasks import KEPT_BACK, load_tasks
from lib.evidence.transfer import (
    Trial,
    certainty,
    divergence_before,
    from_donors,
    read_tasks,
)
from lib.science.correlation import correlate
from lib.science.decoding import decoding_gain, residuals, thirds
from lib.science.estimate import (
    FEWEST_DRAWS,
    N_DRAWS,
    Estimate,
    Measured,
    Untested,
    generator,
    independent_difference,
    mean_of,
    means_by_unit,
    over_seeds,
    pool,
    ratio_of_sums,
    sums_by_unit,
)
from lib.science.geometry import angles, jeffreys_divergence, log_norm_differences

CLAIM = "norm-code"
FEWEST_OF_A_TOKEN = 3
Attribute = Literal["template", "subject"]
ByTask = Mapping[str, Mapping[str, Measured]]
"""Gains by attribute and task."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Texts as a model reads them.

    Attributes:
        decoder: the model.
        tokens: token ids of each text.
        kinds: what kind of text each is `[n_texts]`.
        states: residual streams at the last token `[n_blocks, n_texts, d_model]`.
        logits: next-token logits `[n_texts, d_vocab]`.
        forests: the texts as they were run, until an exchange of their norms needs them no longer.
    """

    decoder: Decoder
    tokens: list[list[int]]
    kinds: np.ndarray
    states: Tensor
    logits: Tensor
    forests: list[Forest] = field(default_factory=list)


def read_texts(decoder: Decoder, texts: Sequence[str], kinds: Sequence[str]) -> Reading:
    """Return texts as the model reads them, at the last token."""
    tokens = tokenize(decoder, list(texts))
    forests: list[Forest] = []
    states = recall_residuals(decoder, tokens, forests=forests, description="texts").states
    logits = logit_lens(decoder, states[-1])
    return Reading(decoder, tokens, np.asarray(kinds), states, logits, forests)


# --- carries context -----------------------------------------------------------------------------


def log_norms(states: Tensor, blocks: Sequence[int]) -> np.ndarray:
    """Return log r `[n_items, n_blocks]` of the states of all blocks `[…, n_items, d_model]`."""
    return states[list(blocks)].double().norm(dim=-1).log().T.numpy()


def nuisances(certain: np.ndarray, last_tokens: Sequence[int]) -> np.ndarray:
    """Return what is regressed out of log r `[n_items, n_columns]`.

    Entropy (nats) and top-1 log-probability of the prediction, `certain`, and an indicator for each
    last token that ends three items or more.
    """
    _, place, count = np.unique(last_tokens, return_inverse=True, return_counts=True)
    common = np.flatnonzero(count >= FEWEST_OF_A_TOKEN)
    indicators = (place[:, None] == common[None, :]).astype(np.float64)
    return np.column_stack([certain, indicators])


def text_attributes(reading: Reading, blocks: Sequence[int]) -> dict[str, Measured]:
    """Return how well log r at some blocks tells each attribute of a text, beyond shuffled labels.

    The kind of text; the last token's position, and its id, which byte-pair vocabularies number by
    frequency, both in thirds.
    """
    last = [tokens[-1] for tokens in reading.tokens]
    left = residuals(log_norms(reading.states, blocks), nuisances(certainty(reading.logits), last))
    labels: Mapping[str, Sequence[object] | np.ndarray] = {
        "kind of text": reading.kinds,
        "position": thirds([len(tokens) for tokens in reading.tokens]),
        "token frequency": thirds(last),
    }
    units = np.arange(len(last))
    return {
        name: decoding_gain(left, label, units, TEXTS, generator("decoding", name))
        for name, label in labels.items()
    }


def task_attribute(
    trial: Trial, blocks: Sequence[int], attribute: Attribute, *, within_answer: bool = False
) -> Measured:
    """Return how well log r tells a prompt's template or subject, beyond shuffled labels.

    Folds never split a subject. So the subject itself is told as the third of the subjects in which
    its norm lies in the *other* templates.

    Args:
        trial: the task as the model reads it.
        blocks: the blocks whose log r are the features.
        attribute: which.
        within_answer: among prompts of one right answer and one choice of the model's alone: log r
            relative to its mean over these, for the subject over those of one template, within
            which its labels are shuffled, too. So neither the answer, nor the choice, nor what they
            do in one template, is told as the subject.
    """
    task = trial.task
    template = task.prompts["template"].to_numpy()
    if len(np.unique(template)) < 2:
        return Untested("one template alone")
    last = [tokens[-1] for tokens in task.tokens]
    if attribute == "template" and len(set(last)) == len(np.unique(template)):
        return Untested("each template ends in a token of its own")
    if within_answer and len(task.answers) == task.n_units:
        return Untested("every answer has one subject")
    left = residuals(log_norms(trial.states("last"), blocks), nuisances(trial.certainty, last))
    told = [task.answer_index, trial.choice] if within_answer else []
    rng = generator("decoding", attribute, task.name, str(within_answer))
    if attribute == "template":
        left = left - _means(left, _cells(told)) if told else left
        return decoding_gain(left, template, task.unit, task.units, rng, strata=task.unit)
    cell = _cells([template, *told])
    left = left - _means(left, cell)
    label = _elsewhere(left.mean(axis=1), task.unit, template)
    return decoding_gain(left, label, task.unit, task.units, rng, strata=cell)


def _cells(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Return the number of each item's combination of labels `[n_items]`."""
    return np.unique(np.stack(labels), axis=1, return_inverse=True)[1]


def _means(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return each item's mean over the items of its label `[n_items, n_columns]`."""
    return means_by_unit(values.T, label)[np.unique(label, return_inverse=True)[1]]


def _elsewhere(values: np.ndarray, unit: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Return in which third each unit's mean value over the other templates lies `[n_items]`."""
    total, count = np.bincount(unit, values), np.bincount(unit)
    others = (total[unit] - values) / (count[unit] - 1)
    label = np.empty(len(values), dtype=np.int64)
    for one in np.unique(template):
        label[template == one] = thirds(others[template == one])
    return label


def task_gains(
    trials: Mapping[str, Trial], blocks: Sequence[int], *, within_answer: bool = False
) -> ByTask:
    """Return `task_attribute` of template and subject on each task."""
    attributes: tuple[Attribute, ...] = ("template", "subject")
    return {
        attribute: {
            name: task_attribute(trial, blocks, attribute, within_answer=within_answer)
            for name, trial in trials.items()
        }
        for attribute in attributes
    }


def pooled_gains(by_task: ByTask) -> dict[str, Measured]:
    """Return each attribute's gain, pooled over tasks."""
    return {attribute: pool(gains) for attribute, gains in by_task.items()}


def ranked(gains: Mapping[str, Measured], place: int) -> Measured:
    """Return the gain that stands at a place, 0 the largest; Untested where there is none."""
    found = [one for one in gains.values() if isinstance(one, Estimate)]
    if len(found) <= place:
        return Untested(f"{len(found)} attributes could be decoded")
    return sorted(found, key=float, reverse=True)[place]


# --- does not determine --------------------------------------------------------------------------


def partial_on_texts(reading: Reading, blocks: Sequence[int]) -> Measured:
    """Return partial ρ(|Δ log r|, J | θ) over texts at each block `[n_blocks]`."""
    return _partial(reading.decoder, reading.states, reading.logits, blocks, TEXTS)


def partial_on_task(trial: Trial, blocks: Sequence[int]) -> Measured:
    """Return the same within templates, a mean over them `[n_blocks]`; subjects are drawn.

    Groups that lack a subject are left out.
    """
    task, states, logits = trial.task, trial.states("last"), trial.logits
    found = [
        _partial(trial.decoder, states[:, rows], logits[rows], blocks, task.units)
        for rows in map(torch.as_tensor, task.cells())
    ]
    return mean_of(found) if found else Untested("no template holds every subject")


def _partial(
    decoder: Decoder, states: Tensor, logits: Tensor, blocks: Sequence[int], units: str
) -> Measured:
    divergences = jeffreys_divergence(logits)
    own = [states[block].double().numpy() for block in blocks]
    return correlate(
        [log_norm_differences(block) for block in own],
        divergences,
        units,
        given=[angles(block) for block in own],
        n_draws=FEWEST_DRAWS if decoder.untrained else N_DRAWS,  # a seed is one number
    )


@dataclass(frozen=True)
class NormExchange:
    """What an exchange of norms does on texts.

    Attributes:
        transfer: T of the norm exchange `[n_blocks]`.
        cost_ratio: KL(p_x ‖ edited) of the norm exchange over that of a turn towards the same donor
            by the same distance `[n_blocks]`.
        direction: T of an exchange of directions with the same donors `[n_blocks]`.
    """

    transfer: Measured
    cost_ratio: Measured
    direction: Measured


def exchange_norms(reading: Reading, late: Sequence[int], blocks: Sequence[int]) -> NormExchange:
    """Exchange every text's norm with one of the longest and one of the shortest states'.

    Args:
        reading: the texts.
        late: blocks over which log r is averaged; donors are of its outer tenths.
        blocks: after which the exchange is made.
    """
    pairs = outer_pairs(log_norms(reading.states, late).mean(axis=1))
    edits: dict[str, Edit] = {
        "norm": exchange_norm,
        "turn": TurnLikeNormExchange(),
        "direction": exchange_direction,
    }
    toward = {"from_donor": pairs[:, 1], "from_recipient": pairs[:, 0]}
    sweep = recall_sweep(
        reading.decoder,
        reading.tokens,
        pairs,
        edits,
        positions="last",
        donors=reading.states[list(blocks)],
        blocks=list(blocks),
        measure=Divergences(Distributions.of(reading.logits), toward),
        forests=reading.forests,
        description="texts: norm exchange",
    )
    reading.forests.clear()  # most of a gigabyte, while the next network is read
    clean = divergence_before(from_donors(reading.logits, pairs[:, 1]), reading.logits, pairs[:, 0])
    whole = sums_by_unit(np.tile(clean, (len(blocks), 1)), pairs[:, 0])
    norm, _, direction = (sums_by_unit(one, pairs[:, 0]) for one in sweep.measures["from_donor"])
    cost, turn, _ = (sums_by_unit(one, pairs[:, 0]) for one in sweep.measures["from_recipient"])
    return NormExchange(
        transfer=ratio_of_sums(whole - norm, whole, TEXTS),
        cost_ratio=ratio_of_sums(cost, turn, TEXTS),
        direction=ratio_of_sums(whole - direction, whole, TEXTS),
    )


def outer_pairs(log_norm: np.ndarray) -> np.ndarray:
    """Return two pairs an item: a donor of the lowest tenth of norms and one of the highest.

    Args:
        log_norm: `[n_items]`.

    Returns:
        Recipients and donors `[2 · n_items, 2]`; no item is its own donor.
    """
    order = np.argsort(log_norm, kind="stable")
    n_items, n_outer = len(order), max(2, len(order) // 10)
    rng = generator("norm donors", str(n_items))
    pairs = []
    for outer in (order[:n_outer], order[-n_outer:]):
        for item, drawn in enumerate(rng.permutation(np.resize(np.arange(n_outer), n_items))):
            donor = outer[drawn] if outer[drawn] != item else outer[(drawn + 1) % n_outer]
            pairs.append((item, int(donor)))
    return np.array(pairs, dtype=np.int64)


# --- dose and response (shown, no verdict) --------------------------------------------------------


def scale_norms(reading: Reading, block: int, factors: Sequence[float]) -> pd.DataFrame:
    """Return what h → c·h after a block does to every fourth text's prediction, a row a factor.

    Columns `factor`; the means over texts of `kl_nats` from the unedited prediction, of
    `kl_left_nats`, what no temperature accounts for, and the median `temperature` that fits best.
    """
    pairs = np.repeat(np.arange(len(reading.tokens))[::4, None], 2, axis=1)
    sweep = recall_sweep(
        reading.decoder,
        reading.tokens,
        pairs,
        {f"× {factor:g}": Scale(factor) for factor in factors},
        positions="last",
        donors=reading.states[[block]],
        blocks=[block],
        measure=DistributionMeasure(reading.logits, pairs[:, 0], temperature=True),
        description="texts: scaled norms",
    )
    return pd.DataFrame(
        {
            "factor": factors,
            "kl_nats": sweep.measures["kl_nats"][:, 0].mean(axis=1),
            "kl_left_nats": sweep.measures["kl_left_nats"][:, 0].mean(axis=1),
            "temperature": np.median(sweep.measures["temperature"][:, 0], axis=1),
        }
    )


# --- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormCode:
    """What the chapter measures on one model's texts and on the book's tasks.

    Attributes:
        gains: by attribute, decoded from log r beyond shuffled labels.
        within: the same within groups of the same answer, right and chosen, by attribute and task.
        partials: partial ρ(|Δ log r|, J | θ) at each late block, by place.
        exchange: what an exchange of norms does on texts.
        blocks: after which norms were exchanged.
    """

    gains: Mapping[str, Measured]
    within: ByTask
    partials: Mapping[str, Measured]
    exchange: NormExchange
    blocks: tuple[int, ...]

    def statistics(self) -> dict[str, Mapping[str, Measured]]:
        """Return what the criteria name, by place, but for what compares with twins."""
        return {
            "second_attribute_gain": {MODEL: ranked(self.gains, 1)},
            "within_answer_gain": {MODEL: ranked(pooled_gains(self.within), 0)},
            "partial_given_angle": self.partials,
            "norm_exchange_transfer": {TEXTS: self.exchange.transfer},
            "norm_cost_ratio": {TEXTS: self.exchange.cost_ratio},
        }

    def of_seed(self) -> dict[str, Mapping[str, Measured]]:
        """Return the statistics of an untrained twin, of whose tasks only the mean counts."""
        tasks = {place: one for place, one in self.partials.items() if place != TEXTS}
        whole = {"twins": pool(tasks)} if tasks else {}
        partials = {TEXTS: self.partials[TEXTS], **whole}
        return {**self.statistics(), "partial_given_angle": partials}


def measure_norm_code(
    reading: Reading, trials: Mapping[str, Trial | Untested], late: Sequence[int]
) -> NormCode:
    """Measure the norm code of one model at the late blocks.

    Exchanges are made after the first, the middle and the last of them.
    """
    able = {name: trial for name, trial in trials.items() if isinstance(trial, Trial)}
    partials = {TEXTS: partial_on_texts(reading, late)}
    partials |= each(trials, lambda trial: partial_on_task(trial, late))
    chosen = sorted({late[0], late[len(late) // 2], late[-1]})
    gains = text_attributes(reading, late) | pooled_gains(task_gains(able, late))
    within = task_gains(able, late, within_answer=True)
    done = exchange_norms(reading, late, chosen)
    return NormCode(gains, within, partials, done, tuple(chosen))


def best_within_answer(networks: Sequence[NormCode]) -> list[Measured]:
    """Return each network's best gain within an answer, by an attribute of its own choice.

    Pooled over those tasks on which all of them could be tested.
    """
    names = networks[0].within
    shared = {name: measured_by_all([one.within[name] for one in networks]) for name in names}
    return [
        ranked({name: pool(gains[number]) for name, gains in shared.items()}, 0)
        for number in range(len(networks))
    ]


def beyond_twins(trained: NormCode, twins: Sequence[NormCode]) -> Measured:
    """Return `best_within_answer` of the trained network less that of its untrained twins."""
    own, *untrained = best_within_answer([trained, *twins])
    return independent_difference(own, over_seeds(untrained))


def kept_back_gains(decoder: Decoder, late: Sequence[int]) -> dict[str, Measured]:
    """Return how well log r at the late blocks tells the subject within an answer, by task.

    On the tasks kept back. Where there is something to tell, more is told of more subjects, so all
    networks that are compared have the same.
    """
    trials = read_tasks(decoder, load_tasks(decoder, files=KEPT_BACK))
    return each(trials, lambda one: task_attribute(one, late, "subject", within_answer=True))
