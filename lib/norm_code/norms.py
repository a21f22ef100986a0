"""Norms of states at the last token: what they tell of the context and of the prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from lib.engine.extraction import tokenize
from lib.engine.models import Decoder
from lib.engine.progress import track
from lib.engine.store import recall_residuals
from lib.evidence.arms import Trial
from lib.evidence.tasks import Task, gate, load_contexts, load_task, task_names
from lib.norm_code.decoding import Decoding, decode_attribute, pool_decodings, thirds
from lib.science.stats import weighted_mean

FloatArray = NDArray[np.float64]

CONTEXTS = "contexts"
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
