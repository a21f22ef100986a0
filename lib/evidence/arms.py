"""The two arms of the causal test, and the block where one hands over to the other.

Context arm: the residual stream is edited at the subject's token. Prediction arm: at the last
token. Both are swept over all blocks, and each pair of prompts is judged by the closed answer set:
did the donor's answer come through?
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from torch import Tensor

from lib.engine.extraction import Positions, check_blocks
from lib.engine.files import write_atomically
from lib.engine.edits import Edit, exchange
from lib.engine.models import Decoder
from lib.engine.store import recall_residuals, recall_sweep
from lib.evidence.results import RESULTS
from lib.evidence.runs import keep_run
from lib.evidence.tasks import Gate, Task, gate, load_task, ordered_pairs, task_names
from lib.science.stats import bootstrap_weights, pair_share_bootstrap
from lib.science.transitions import Transition, find_transition

Arm = Literal["context arm", "prediction arm"]
Site = Literal["subject", "last", "subject to second last", "subject to last", "after subject"]
Values = Literal["flipped", "changed", "excess", "recovered", "probability_change"]
ARMS: Mapping[Arm, Site] = {"context arm": "subject", "prediction arm": "last"}
_REST: Mapping[Site, Site] = {"subject": "after subject", "subject to second last": "last"}
TRANSITIONS = RESULTS.parent / "transitions.json"  # the results folder holds records alone


@dataclass(frozen=True, eq=False)
class Trial:
    """A task as one model does it: the prompts to use and what counts as each prompt's answer.

    Attributes:
        task: the task.
        decoder: the model.
        target: index into `task.answers` of what each prompt stands for `[n_prompts]`: the right
            answer where the model passes the gate; the model's own choice where it does not.
        usable: which prompts take part `[n_prompts]`: the correctly answered ones, or all.
        own_choice: whether `target` is the model's own choice.
        clean_logits: unedited logits of the answers `[n_prompts, n_answers]`.
    """

    task: Task
    decoder: Decoder
    target: np.ndarray
    usable: np.ndarray
    own_choice: bool
    clean_logits: np.ndarray

    def pairs(
        self, *, donors_per_prompt: int | None = None, same_answer: bool = False
    ) -> np.ndarray:
        """Return (recipient, donor) prompts `[n_pairs, 2]` that differ in target, or share it.

        Within a template; where a model is judged by its own choice, pairs that differ are formed
        across templates, since within one an untrained model hardly ever wavers.
        """
        prompts = self.task.prompts.assign(answer=[self.task.answers[i] for i in self.target])
        if self.own_choice and not same_answer:
            apart = [str(row) for row in range(len(prompts))]
            prompts = prompts.assign(template=0, group="", subject=apart)
        return ordered_pairs(
            prompts,
            donors_per_prompt=donors_per_prompt,
            same_answer=same_answer,
            mask=self.usable,
        )


@dataclass(frozen=True, eq=False)
class ArmOutcome:
    """What one edit at one site did to each pair, by block; all arrays `[n_blocks, n_pairs]`.

    Attributes:
        pairs: recipient and donor `[n_pairs, 2]`.
        blocks: after which the edit was made.
        flipped: whether the closed-set argmax became the donor's answer.
        changed: whether it is no longer the recipient's answer.
        recovered: recovered logit difference: 0 as unedited, 1 as the donor's own prompt.
        probability_change: change of the donor's answer's probability over the full vocabulary;
            empty unless asked for.
        largest_shift: largest change of any answer's probability within the closed set.
    """

    pairs: np.ndarray
    blocks: tuple[int, ...]
    flipped: np.ndarray
    changed: np.ndarray
    recovered: np.ndarray
    probability_change: np.ndarray
    largest_shift: np.ndarray
    n_answers: int

    def select(self, kept: np.ndarray) -> "ArmOutcome":
        """Return the outcome of the pairs where `kept` is true `[n_pairs]`."""
        arrays = ("flipped", "changed", "recovered", "probability_change", "largest_shift")
        chosen = {name: getattr(self, name)[:, kept] for name in arrays}
        return replace(self, pairs=self.pairs[kept], **chosen)

    @property
    def excess(self) -> np.ndarray:
        """Flips beyond chance: 1 for the donor's answer, −1 / (n_answers − 2) for other wrong ones.

        0 on average for an edit that brings wrong answers without regard to the donor.
        """
        other = self.changed & ~self.flipped
        result: np.ndarray = self.flipped - other / max(self.n_answers - 2, 1)
        return result

    def curve(
        self,
        weights: np.ndarray,
        values: Values = "flipped",
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """Return the mean over pairs by block with its interval, and the draws behind it.

        Args:
            weights: prompt weights `[n_draws, n_prompts]` of `bootstrap_weights`: recipients and
                donors are both drawn anew.
            values: which outcome.

        Returns:
            A table with `block`, `estimate`, `low`, `high`, `n` (prompts), and the draws
            `[n_draws, n_blocks]`.
        """
        table = np.asarray(getattr(self, values), dtype=np.float64)
        draws = pair_share_bootstrap(table, self.pairs, weights)
        low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
        curve = pd.DataFrame(
            {
                "block": self.blocks,
                "estimate": table.mean(axis=1),
                "low": low,
                "high": high,
                "n": len(np.unique(self.pairs)),
            }
        )
        return curve, draws


def prepare_trial(decoder: Decoder, task: Task, result: Gate) -> Trial:
    """Return the prompts and targets by which `decoder` is judged on `task`.

    A model that passes the gate is judged by the right answers on its correctly answered prompts.
    One that does not (the untrained twin, say) is judged by its own choice on all prompts, so that
    its null is a measured one.
    """
    truth = task.prompts["answer_index"].to_numpy()
    if result.testable:
        return Trial(task, decoder, truth, result.correct, False, result.logits)
    everyone = np.ones(len(truth), dtype=bool)
    return Trial(task, decoder, result.predicted, everyone, True, result.logits)


def sweep_site(
    trial: Trial,
    pairs: np.ndarray,
    site: Site,
    *,
    edit: Edit = exchange,
    donors: Tensor | None = None,
    blocks: Sequence[int] | None = None,
    full_vocabulary: bool = False,
    description: str | None = None,
) -> ArmOutcome:
    """Return what editing at `site` does to each pair, after each block.

    Exchanges before the last token are computed from the other side. If donor and recipient begin
    alike, the recipient with the donor's states from the subject's token to token t *is* the
    donor's prompt with the recipient's states from token t + 1 on: fewer tokens to run, and none
    if t is the last.

    Args:
        trial: the task and the model.
        pairs: prompts (recipient, donor) `[n_pairs, 2]`; the donor's target is what should come
            through.
        site: which positions are edited.
        edit: what is done there.
        donors: what the edit takes from the donor, one for each pair
            `[n_blocks, n_pairs, d_model]` for all blocks of the model; by default the donor
            prompt's own states.
        blocks: after which to edit, all by default.
        full_vocabulary: also measure probabilities over the full vocabulary.
        description: what a progress display calls this.
    """
    decoder, task = trial.decoder, trial.task
    wanted = check_blocks(decoder, blocks)
    shape = (len(wanted), len(pairs))
    logits, normaliser = np.empty((*shape, len(task.answers))), np.full(shape, np.nan)
    rows = pairs
    mirrored = edit is exchange and donors is None and _begin_alike(task, pairs)
    if mirrored and site in _REST:
        site, rows = _REST[site], pairs[:, ::-1]
    elif donors is not None:
        rows = np.stack([pairs[:, 0], np.arange(len(pairs))], axis=1)
    if site in ("subject", "last") and donors is None:
        donors = site_states(trial, "subject" if site == "subject" else "last")
    if mirrored and site == "subject to last":  # nothing of the recipient is left
        logits[:] = trial.clean_logits[pairs[:, 1]]
        return _judge_pairs(trial, pairs, wanted, logits, normaliser)
    for positions, chosen in _line_up(task, site, rows):
        sweep = recall_sweep(
            decoder,
            task.tokens,
            rows[chosen],
            {"edit": edit},
            positions=positions,
            donors=None if donors is None else donors[list(wanted)],
            blocks=wanted,
            read_ids=task.answer_ids.tolist(),
            measure=_normaliser if full_vocabulary else None,
            description=description,
        )
        logits[:, chosen] = sweep.logits[0]
        if full_vocabulary:
            normaliser[:, chosen] = sweep.measures["normaliser"][0]
    return _judge_pairs(trial, pairs, wanted, logits, normaliser)


def site_states(trial: Trial, site: Literal["subject", "last"]) -> Tensor:
    """Return the residual streams of all prompts at one site `[n_blocks, n_prompts, d_model]`."""
    where: Positions = trial.task.subject_positions if site == "subject" else "last"
    return recall_residuals(trial.decoder, trial.task.tokens, positions=where).states


def steering_vectors(trial: Trial, pairs: np.ndarray, site: Literal["subject", "last"]) -> Tensor:
    """Return each pair's vector, fitted on other templates, `[n_blocks, n_pairs, d_model]`.

    The centroid of the residual streams that stand for the donor minus the centroid of those that
    stand for the recipient: prompts with the same subject (subject's token) or the same target
    (last token), in every template but the pair's own. Source: centroid-difference steering as in
    the paper's two arms; the split by template is ours.

    Raises:
        ValueError: a pair has no prompt of its subject or target in another template.
    """
    task, prompts = trial.task, trial.task.prompts
    states = site_states(trial, site)
    stands_for = prompts["subject"].factorize()[0] if site == "subject" else trial.target
    templates = prompts["template"].to_numpy()
    vectors = torch.empty(states.shape[0], len(pairs), states.shape[2])
    for index, pair in enumerate(pairs):
        centroids = []
        for prompt in pair[::-1]:
            alike = stands_for == stands_for[prompt]
            others = np.flatnonzero(alike & trial.usable & (templates != templates[pair[0]]))
            if len(others) == 0:
                raise ValueError(
                    f"Task {task.name!r}: {prompts['text'][prompt]!r} has no counterpart among the "
                    "usable prompts of other templates; leave the pair out."
                )
            centroids.append(states[:, others].mean(dim=1))
        vectors[:, index] = centroids[0] - centroids[1]
    return vectors


def has_counterparts(trial: Trial, pairs: np.ndarray) -> np.ndarray:
    """Say for which pairs `steering_vectors` can be fitted at both sites `[n_pairs]`."""
    prompts = trial.task.prompts
    templates = prompts["template"].to_numpy()
    found = np.ones(len(pairs), dtype=bool)
    for stands_for in (prompts["subject"].factorize()[0], trial.target):
        for index, pair in enumerate(pairs):
            elsewhere = trial.usable & (templates != templates[pair[0]])
            found[index] &= all((elsewhere & (stands_for == stands_for[p])).any() for p in pair)
    return found


def transition_of(context: ArmOutcome, prediction: ArmOutcome, weights: np.ndarray) -> Transition:
    """Return where the context arm's falling and the prediction arm's rising flip rates cross."""
    curves = [outcome.curve(weights) for outcome in (context, prediction)]
    return find_transition(
        curves[0][0]["estimate"],
        curves[1][0]["estimate"],
        curves[0][1],
        curves[1][1],
        n_prompts=len(np.unique(context.pairs)),
    )


def transition_blocks(decoder: Decoder, *, donors_per_prompt: int = 2) -> pd.DataFrame:
    """Return each testable task's transition: columns `task`, `block`, `low`, `high`, `n`.

    The phase-transition chapter stores what it measured, and that is used where it concerns this
    model. Otherwise a smaller sweep measures it here: one template, few donors.
    """
    stored = _stored().get(_key(decoder))
    if stored is not None:
        return pd.DataFrame(stored, columns=["task", "block", "low", "high", "n"])
    rows = []
    for name in task_names():
        try:
            task = load_task(name, decoder)
        except ValueError:
            continue  # not tokenized as single tokens by this model: not testable
        result = gate(decoder, task)
        if not result.testable:
            continue
        trial = prepare_trial(decoder, task, result)
        pairs = trial.pairs(donors_per_prompt=donors_per_prompt)
        pairs = pairs[task.prompts["template"].to_numpy()[pairs[:, 0]] == 0]
        context, prediction = (
            sweep_site(trial, pairs, site, description=f"{name}: transition")
            for site in ARMS.values()
        )
        weights = bootstrap_weights(task.n_prompts, 500, np.random.default_rng(0))
        found = transition_of(context, prediction, weights)
        if found.found:
            rows.append((name, found.block, found.low, found.high, found.n_prompts))
    return pd.DataFrame(rows, columns=["task", "block", "low", "high", "n"])


def store_transitions(decoder: Decoder, transitions: Mapping[str, Transition]) -> None:
    """Keep the transitions measured on `decoder`, by task, for other chapters and models."""
    rows = [
        {"task": task, "block": t.block, "low": t.low, "high": t.high, "n": t.n_prompts}
        for task, t in transitions.items()
        if t.found
    ]
    write_atomically(TRANSITIONS, json.dumps({**_stored(), _key(decoder): rows}, indent=1))
    keep_run(decoder, rows)


def _stored() -> dict[str, list[dict[str, object]]]:
    try:
        return json.loads(TRANSITIONS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _key(decoder: Decoder) -> str:
    return f"{decoder.name}, {decoder.revision}{', untrained' if decoder.untrained else ''}"


def _normaliser(logits: Tensor, _pair: Tensor) -> dict[str, Tensor]:
    return {"normaliser": logits.logsumexp(-1)}


def _line_up(task: Task, site: Site, pairs: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions for every prompt `[n_prompts, k]` and the pairs that they hold for.

    Templates differ in k where a site has several tokens; then each is a call of its own, and the
    positions of the others are placeholders that are never edited.
    """
    subjects = np.asarray(task.subject_positions)
    ends = np.array([len(tokens) for tokens in task.tokens]) - 1
    if site in ("subject", "last"):
        yield (subjects if site == "subject" else ends)[:, None], np.arange(len(pairs))
        return
    templates = task.prompts["template"].to_numpy()
    for template in np.unique(templates[pairs[:, 0]]):
        prompt = int(np.flatnonzero(templates == template)[0])
        chosen = range(
            subjects[prompt] + (site == "after subject"),
            ends[prompt] + (site != "subject to second last"),
        )
        positions = np.ones((task.n_prompts, len(chosen)), dtype=np.int64)
        positions[templates == template] = list(chosen)
        yield positions, np.flatnonzero(templates[pairs[:, 0]] == template)


def _begin_alike(task: Task, pairs: np.ndarray) -> bool:
    """Say whether recipient and donor of every pair share their tokens before the subject's."""
    starts = [
        tuple(tokens[:subject])
        for tokens, subject in zip(task.tokens, task.subject_positions, strict=True)
    ]
    lengths = [len(tokens) for tokens in task.tokens]
    return all(starts[x] == starts[y] and lengths[x] == lengths[y] for x, y in pairs)


def _judge_pairs(
    trial: Trial,
    pairs: np.ndarray,
    blocks: tuple[int, ...],
    logits: np.ndarray,
    normaliser: np.ndarray,
) -> ArmOutcome:
    recipient, donor = pairs.T
    source, target = trial.target[recipient], trial.target[donor]
    clean, own = trial.clean_logits[recipient], trial.clean_logits[donor]
    column = np.arange(len(pairs))
    choice = logits.argmax(-1)
    before = clean[column, target] - clean[column, source]
    full = own[column, target] - own[column, source]
    after = logits[:, column, target] - logits[:, column, source]
    with np.errstate(divide="ignore", invalid="ignore"):
        recovered = np.where(full == before, 0.0, (after - before) / (full - before))
    probability = np.exp(logits[:, column, target] - normaliser)
    return ArmOutcome(
        pairs=pairs,
        blocks=blocks,
        flipped=choice == target,
        changed=choice != source,
        recovered=recovered,
        probability_change=probability - _clean_probability(trial, recipient, target)
        if np.isfinite(normaliser).all()
        else np.empty((0, len(pairs))),
        largest_shift=np.abs(softmax(logits, axis=-1) - softmax(clean, axis=-1)).max(-1),
        n_answers=len(trial.task.answers),
    )


def _clean_probability(trial: Trial, recipient: np.ndarray, target: np.ndarray) -> np.ndarray:
    logits = recall_residuals(trial.decoder, trial.task.tokens, logits=True).logits
    assert logits is not None
    normaliser = logits[recipient].double().logsumexp(-1).numpy()
    result: np.ndarray = np.exp(
        trial.clean_logits[recipient, target].astype(np.float64) - normaliser
    )
    return result
