"""Norms of states at the last token: what they tell of the context and of the prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from lib.arms import Trial
from lib.divergences import jeffreys_of_logits
from lib.extraction import tokenize
from lib.metrics import angles, log_norm_differences
from lib.models import Decoder
from lib.norm_code.decoding import Decoding, decode_attribute, pool_decodings, thirds
from lib.progress import track
from lib.stats import weighted_mean
from lib.store import recall_residuals
from lib.tasks import Task, gate, load_contexts, load_task, task_names

FloatArray = NDArray[np.float64]

CONTEXTS = "contexts"
RELATIONS = ("norm", "angle", "norm given angle")
MINIMUM_ITEMS = 4
"""Fewest prompts of a template whose pairs are compared."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Prompts of one kind, as one model reads them.

    Attributes:
        task: a task's name, or `contexts`.
        decoder: the model.
        prompts: one row a prompt: `tokens` and the attributes (`kind`, or `template`, `subject`
            and `answer`).
        usable: which prompts are analysed `[n_prompts]`.
        states: residual stream at the last token `[n_blocks, n_prompts, d_model]`.
        logits: next-token logits `[n_prompts, d_vocab]`, or None where they were not asked for.
        trial: the task and what counts as each prompt's answer; None for contexts.
    """

    task: str
    decoder: Decoder
    prompts: pd.DataFrame
    usable: np.ndarray
    states: Tensor
    logits: Tensor | None
    trial: Trial | None = None

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return self.prompts["tokens"].tolist()

    @property
    def log_norms(self) -> FloatArray:
        """Return log r of every prompt `[n_blocks, n_prompts]`; −∞ for a state of norm 0."""
        with np.errstate(divide="ignore"):
            result: FloatArray = np.log(self.states.double().norm(dim=-1).numpy())
        return result


def read_contexts(decoder: Decoder, n: int, *, description: str | None = None) -> Sample:
    """Return `n` of the book's contexts at their last token; position 0 is never one of them.

    Raises:
        ValueError: a context of a single token.
    """
    prompts = load_contexts(n)
    prompts["tokens"] = pd.Series(tokenize(decoder, prompts["context"].tolist()))
    return _read(CONTEXTS, decoder, prompts, description)


def read_tokens(decoder: Decoder, n: int, *, seed: int, description: str | None = None) -> Sample:
    """Return one token from inside each of `n` contexts, no token of the vocabulary twice.

    Contexts often end in the same word, which leaves little of token frequency to vary. So a
    position from 1 on is drawn in each context, in random order, among those whose token has not
    been drawn yet; a context without one is left out. A state depends on nothing that follows, so
    the context is cut there.
    """
    rng = np.random.default_rng(seed)
    prompts = load_contexts(n)
    prompts["tokens"] = pd.Series(tokenize(decoder, prompts["context"].tolist()))
    seen: set[int] = set()
    cuts: dict[int, list[int]] = {}
    for row in rng.permutation(len(prompts)).tolist():
        tokens = prompts["tokens"].iloc[row]
        free = [at for at in range(1, len(tokens)) if tokens[at] not in seen]
        if free:
            at = int(rng.choice(free))
            seen.add(tokens[at])
            cuts[row] = tokens[: at + 1]
    chosen = prompts.loc[sorted(cuts)].reset_index(drop=True)
    chosen["tokens"] = pd.Series([cuts[row] for row in sorted(cuts)])
    return _read("tokens", decoder, chosen, description, logits=False)


def read_tasks(decoder: Decoder) -> tuple[dict[str, Sample], pd.DataFrame]:
    """Return each task that the model passes, its correctly answered prompts usable, and the gate.

    A model is run once on each prompt. The gate's table has a row for every task, with the reason.
    """
    samples: dict[str, Sample] = {}
    rows: list[dict[Any, Any]] = []
    for name in track(task_names(), "tasks"):
        try:
            task = load_task(name, decoder)
        except ValueError as problem:
            rows.append({"task": name, "testable": False, "reason": str(problem)})
            continue
        sample = _read(name, decoder, task.prompts)
        result = gate(decoder, task, logits=sample.logits)
        rows.extend(result.to_frame().to_dict("records"))
        if result.testable:
            target = task.prompts["answer_index"].to_numpy()
            samples[name] = _with_trial(sample, task, target, result.correct, own_choice=False)
    columns = ["task", "accuracy", "chance", "n", "testable", "reason"]
    return samples, pd.DataFrame(rows, columns=columns)


def read_twin_tasks(twin: Decoder, samples: Mapping[str, Sample]) -> dict[str, Sample]:
    """Return the same prompts as the untrained twin reads them, judged by its own choice."""
    found = {}
    for name in track(list(samples), "tasks, untrained twin"):
        trial = samples[name].trial
        assert trial is not None
        sample = _read(name, twin, trial.task.prompts)
        assert sample.logits is not None
        own = sample.logits[:, trial.task.answer_ids.tolist()].argmax(-1).numpy()
        found[name] = _with_trial(sample, trial.task, own, samples[name].usable, own_choice=True)
    return found


def _with_trial(
    sample: Sample, task: Task, target: np.ndarray, usable: np.ndarray, *, own_choice: bool
) -> Sample:
    assert sample.logits is not None
    closed = sample.logits[:, task.answer_ids.tolist()].numpy()
    trial = Trial(task, sample.decoder, target, usable, own_choice, closed)
    return replace(sample, usable=usable, trial=trial)


def _read(
    task: str,
    decoder: Decoder,
    prompts: pd.DataFrame,
    description: str | None = None,
    *,
    logits: bool = True,
) -> Sample:
    if (short := prompts["tokens"].map(len) < 2).any():
        raise ValueError(
            f"{task}: prompt {int(np.argmax(short))} is one token; position 0 is an attention "
            "sink that is never analysed. Leave it out."
        )
    read = recall_residuals(
        decoder, prompts["tokens"].tolist(), logits=logits, description=description
    )
    usable = np.ones(len(prompts), dtype=bool)
    return Sample(task, decoder, prompts, usable, read.states, read.logits)


# --- size ----------------------------------------------------------------------------------------


def norm_growth(sample: Sample, weights: FloatArray) -> pd.DataFrame:
    """Return the geometric mean of r by block, and how widely r varies over the prompts.

    Columns `block`, `estimate`, `low`, `high`, `n`, and `range_low`, `range_high`: the factors of
    that mean between which 95 % of the prompts lie, the norm's natural range.
    """
    logs = sample.log_norms[:, sample.usable]
    draws = weighted_mean(logs.T, weights)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    centre = logs.mean(axis=1)
    spread = np.quantile(logs - centre[:, None], [0.025, 0.975], axis=1)
    return pd.DataFrame(
        {
            "block": np.arange(len(logs)),
            "estimate": np.exp(centre),
            "low": np.exp(low),
            "high": np.exp(high),
            "n": logs.shape[1],
            "range_low": np.exp(spread[0]),
            "range_high": np.exp(spread[1]),
        }
    )


# --- what it carries -----------------------------------------------------------------------------


def decode_contexts(
    contexts: Sample, tokens: Sample, blocks: Sequence[int], *, seed: int
) -> dict[str, Decoding]:
    """Return what log r alone tells of a context: kind of text, position, token frequency.

    Kind and position are read at the last token, whose position is the context's length.
    Frequency is read at the tokens of `read_tokens`: a token's number in the vocabulary stands for
    it, since byte-pair merges are numbered in the order of their counts in the tokenizer's corpus.
    Position and frequency are decoded as thirds of the sample.
    """
    plans = {
        "kind of text": (contexts, contexts.prompts["kind"].to_numpy()),
        "position": (contexts, thirds(contexts.prompts["tokens"].map(len))),
        "token frequency": (tokens, thirds(tokens.prompts["tokens"].map(lambda ids: ids[-1]))),
    }
    return {
        name: decode_attribute(
            name,
            sample.log_norms[list(blocks)],
            labels,
            np.arange(len(labels)),
            blocks=blocks,
            rng=np.random.default_rng([seed, index]),
        )
        for index, (name, (sample, labels)) in enumerate(plans.items())
    }


def decode_tasks(
    samples: Sequence[Sample], blocks: Sequence[int], *, seed: int
) -> dict[str, Decoding]:
    """Return what log r alone tells of a task's prompt, pooled over tasks.

    `template`: subjects held out. `subject`: templates held out, log r relative to its template's
    mean. Both again within the prompts of each answer, where some answer has several subjects.
    """
    plans = {
        "template": ("template", "subject", False, None),
        "subject": ("subject", "template", True, None),
        "template, same answer": ("template", "subject", False, "answer"),
        "subject, same answer": ("subject", "template", True, "answer"),
    }
    found: dict[str, list[Decoding]] = {name: [] for name in plans}
    for number, sample in enumerate(samples):
        rows = sample.prompts[sample.usable]
        if len(rows) == 0:
            continue
        values = sample.log_norms[list(blocks)][:, sample.usable]
        for index, (name, (label, group, centre, stratum)) in enumerate(plans.items()):
            found[name].append(
                decode_attribute(
                    name,
                    values,
                    rows[label].to_numpy(),
                    rows[group].to_numpy(),
                    blocks=blocks,
                    strata=None if stratum is None else rows[stratum].to_numpy(),
                    centre=centre,
                    rng=np.random.default_rng([seed, 10 + number, index]),
                )
            )
    return {name: pool_decodings(name, parts)[0] for name, parts in found.items() if parts}


# --- what it says of the prediction --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Relation:
    """Rank correlations with the divergence J of predictions: of norm, angle, norm given angle.

    Attributes:
        task: the sample's name.
        blocks: the blocks.
        estimate: by name of `RELATIONS` `[n_blocks]`.
        draws: bootstrap draws by name `[n_draws, n_blocks]`; NaN where a draw has no value.
        n: prompts compared.
    """

    task: str
    blocks: tuple[int, ...]
    estimate: Mapping[str, FloatArray]
    draws: Mapping[str, FloatArray]
    n: int

    def to_frame(self) -> pd.DataFrame:
        """Return `task`, `curve`, `block`, `estimate`, `low`, `high`, `n`."""
        tables = []
        for name in RELATIONS:
            low, high = np.nanquantile(self.draws[name], [0.025, 0.975], axis=0)
            tables.append(
                pd.DataFrame(
                    {
                        "task": self.task,
                        "curve": name,
                        "block": self.blocks,
                        "estimate": self.estimate[name],
                        "low": low,
                        "high": high,
                        "n": self.n,
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def mean_over(self, name: str, blocks: Sequence[int]) -> tuple[float, FloatArray]:
        """Return the mean over blocks and its draws."""
        rows = [self.blocks.index(block) for block in blocks]
        return float(self.estimate[name][rows].mean()), self.draws[name][:, rows].mean(axis=1)


def relate_norms(
    sample: Sample, weights: FloatArray, blocks: Sequence[int], *, description: str | None = None
) -> Relation | None:
    """Return how |Δ log r| and θ go with J over the pairs of prompts, at each block.

    Prompts of a task are compared within their template only; contexts all with each other. Ranks
    are taken within the template, once; see `stratified_correlations`.

    Args:
        sample: the prompts.
        weights: `[n_draws, n_usable]`.
        blocks: the blocks.
        description: what a progress display calls this.

    Returns:
        None where too few prompts, equal norms or equal predictions leave nothing to correlate.
    """
    strata = (
        sample.prompts["template"].to_numpy()[sample.usable]
        if "template" in sample.prompts
        else np.zeros(int(sample.usable.sum()), dtype=int)
    )
    names, counts = np.unique(strata, return_counts=True)
    large = names[counts >= MINIMUM_ITEMS]
    kept = np.isin(strata, large)
    if not kept.any():
        return None
    strata, weights = strata[kept], weights[:, kept]
    rows = np.flatnonzero(sample.usable)[kept]
    assert sample.logits is not None
    prediction = jeffreys_of_logits(sample.logits[rows])
    states = sample.states[list(blocks)][:, rows].numpy()
    weights = np.concatenate([np.ones((1, len(rows))), weights])
    found = []
    try:
        for block in track(states, description) if description else states:
            matrices = [log_norm_differences(block), prediction, angles(block)]
            found.append(stratified_correlations(matrices, strata, weights))
    except ValueError:
        return None
    r = np.stack(found, axis=1)
    norm, angle, between = r[..., 0, 1], r[..., 1, 2], r[..., 0, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        partial = (norm - between * angle) / np.sqrt((1 - between**2) * (1 - angle**2))
    values = dict(zip(RELATIONS, (norm, angle, partial), strict=True))
    return Relation(
        sample.task,
        tuple(blocks),
        {name: value[0] for name, value in values.items()},
        {name: value[1:] for name, value in values.items()},
        len(rows),
    )


def relate_samples(
    contexts: Sample,
    tasks: Mapping[str, Sample],
    weights: Mapping[str, FloatArray],
    blocks: Sequence[int],
) -> dict[str, Relation]:
    """Return `relate_norms` of the contexts and of every task where it exists, by name."""
    found = {
        name: relate_norms(
            sample, weights[name][:, sample.usable], blocks, description=f"{name}: relation"
        )
        for name, sample in {CONTEXTS: contexts, **tasks}.items()
    }
    return {name: relation for name, relation in found.items() if relation is not None}


def stratified_correlations(
    matrices: Sequence[FloatArray], strata: np.ndarray, weights: FloatArray
) -> FloatArray:
    """Return rank correlations over the pairs within strata `[n_draws, n_matrices, n_matrices]`.

    Each matrix is ranked and standardised within each stratum, so that no difference between
    strata counts; a pair (i, j) counts w_i·w_j times. With one stratum equal to
    `lib.correlations.weighted_correlations` of `rank_matrix`. NaN in a draw without value.

    Args:
        matrices: symmetric `[n_items, n_items]`.
        strata: `[n_items]`.
        weights: `[n_draws, n_items]`; a row of ones gives the estimate.

    Raises:
        ValueError: a matrix that is constant within a stratum.
    """
    within = strata[:, None] == strata[None, :]
    np.fill_diagonal(within, False)
    ranked = [_rank_within(matrix, strata) for matrix in matrices]

    def pair_sum(matrix: FloatArray) -> FloatArray:
        total: FloatArray = np.einsum("di,di->d", weights @ matrix, weights)
        return total

    with np.errstate(divide="ignore", invalid="ignore"):
        n_pairs = pair_sum(within.astype(np.float64))
        means = [pair_sum(matrix) / n_pairs for matrix in ranked]
        products = np.empty((len(weights), len(ranked), len(ranked)))
        for i, first in enumerate(ranked):
            for j, second in enumerate(ranked[: i + 1]):
                covariance = pair_sum(first * second) / n_pairs - means[i] * means[j]
                products[:, i, j] = products[:, j, i] = covariance
        variances = np.einsum("dii->di", products).copy()
        variances[variances < 1e-12] = np.nan
        scales = np.sqrt(variances)
        result: FloatArray = np.clip(products / (scales[:, :, None] * scales[:, None, :]), -1, 1)
    return result


def _rank_within(matrix: FloatArray, strata: np.ndarray) -> FloatArray:
    result = np.zeros_like(matrix)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        rows, columns = np.triu_indices(len(members), 1)
        i, j = members[rows], members[columns]
        ranks = rankdata(matrix[i, j])
        if np.ptp(ranks) == 0:
            raise ValueError("A dissimilarity matrix is constant within a stratum.")
        ranks = (ranks - ranks.mean()) / ranks.std()
        result[i, j] = result[j, i] = ranks
    return result
