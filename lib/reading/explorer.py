"""What the depth explorer shows of a task: map, causal curves, correlation, top predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib.angular_code.angular import correlate_sets, measure_sets
from lib.angular_code.angular_views import MAPPED
from lib.angular_code.depth import ANGLE
from lib.angular_code.geometry import task_items
from lib.angular_code.maps import DepthMap, Panel, depth_positions
from lib.engine.extraction import logit_lens
from lib.engine.models import Decoder
from lib.evidence.arms import ARMS, Trial
from lib.phase_transition.switch import find_transitions, measure_arms, prepare_trials
from lib.science.stats import bootstrap_weights

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

N_TOP = 5
TWIN = f"{ANGLE.name}, untrained"


@dataclass(frozen=True, eq=False)
class Exploration:
    """One task at every block.

    Attributes:
        texts: the prompts, in the order of the map's items.
        depth_map: the map of their representations; one panel, the trained model.
        curves: columns `curve` (both arms, the angle's correlation, the same untrained), `block`,
            `estimate`, `low`, `high`.
        top_tokens: the most probable next tokens that the logit lens reads at the last token, best
            first, ``[n_blocks, n_items, N_TOP]``.
        top_probabilities: their probabilities over the full vocabulary, the same shape.
        answers: each prompt's right answer, a token ``[n_items]``.
        words: how each of these tokens is written.
    """

    texts: Sequence[str]
    depth_map: DepthMap
    curves: pd.DataFrame
    top_tokens: IntArray
    top_probabilities: FloatArray
    answers: IntArray
    words: Mapping[int, str]


def explore_tasks(
    decoder: Decoder,
    twin: Decoder,
    names: Sequence[str] = MAPPED,
    *,
    n_tasks: int = 2,
    donors_per_prompt: int | None = 2,
    n_draws: int = 200,
    seed: int = 0,
) -> list[Exploration]:
    """Return the first tasks among `names` that can be explored; none if the model passes none.

    Args:
        decoder: the model.
        twin: its untrained twin.
        names: tasks, in the order in which they are tried.
        n_tasks: how many are wanted.
        donors_per_prompt: of the exchange; with the phase-transition chapter's number its sweeps
            are recalled, not measured again.
        n_draws: bootstrap draws behind the intervals.
        seed: of the draws.
    """
    found: list[Exploration] = []
    for name in names:
        if len(found) == n_tasks:
            break
        trials, _ = prepare_trials(decoder, [name])
        if name in trials:
            try:
                found.append(
                    explore_trial(
                        trials[name],
                        twin,
                        donors_per_prompt=donors_per_prompt,
                        n_draws=n_draws,
                        seed=seed,
                    )
                )
            except ValueError:
                continue  # Too few prompts are left to compare.
    return found


def explore_trial(
    trial: Trial, twin: Decoder, *, donors_per_prompt: int | None, n_draws: int, seed: int
) -> Exploration:
    """Return what the explorer shows of one task.

    States and sweeps come from the store that the chapters share. All curves and the map are those
    of all templates, and so are the twin's, unless it does not tell the prompts apart.

    Raises:
        ValueError: too few usable prompts, or a measure that is undefined on them.
    """
    decoder, task = trial.decoder, trial.task
    items = task_items(task, trial.usable)
    weights = bootstrap_weights(task.n_prompts, n_draws, np.random.default_rng(seed))
    arms = measure_arms({task.name: trial}, donors_per_prompt=donors_per_prompt)
    switch = find_transitions(arms, {task.name: weights})[task.name]
    curves = [arms[task.name][arm].curve(weights)[0].assign(curve=arm) for arm in ARMS]
    measured, reasons = measure_sets(decoder, {task.name: items})
    correlated, undefined = correlate_sets(measured, n_draws=n_draws, seed=seed)
    if task.name not in correlated:
        raise ValueError({**reasons, **undefined}[task.name])
    twins, _ = correlate_sets(measure_sets(twin, {task.name: items})[0], n_draws=n_draws, seed=seed)
    for name, one in ((ANGLE.name, correlated), (TWIN, twins)):
        tables = [found.to_frame() for found in one.values()]
        curves += [table[table["curve"] == ANGLE.name].assign(curve=name) for table in tables]
    positions, shown = depth_positions(measured[task.name].states)
    panel = Panel("trained", positions, shown, correlated[task.name].values[ANGLE.name][0])
    templates = items.strata.tolist()
    place = switch.block if switch.found else None
    states = torch.as_tensor(measured[task.name].states)
    tokens, probabilities = top_predictions(decoder, states)
    ids = dict(zip(task.answers, task.answer_ids.tolist(), strict=True))
    answers = np.array([ids[answer] for answer in items.answers])
    return Exploration(
        texts=items.texts,
        depth_map=DepthMap(task.name, items.labels, items.answers, templates, [panel], place),
        curves=pd.concat(curves)[["curve", "block", "estimate", "low", "high"]],
        top_tokens=tokens,
        top_probabilities=probabilities,
        answers=answers,
        words={token: _word(decoder, token) for token in {*tokens.ravel().tolist(), *ids.values()}},
    )


def top_predictions(
    decoder: Decoder, states: Tensor, n_top: int = N_TOP
) -> tuple[IntArray, FloatArray]:
    """Return the most probable next tokens that the logit lens reads from states, best first.

    Args:
        decoder: the model.
        states: the residual stream after each block, ``[n_blocks, n_items, d_model]``.
        n_top: how many tokens.

    Returns:
        Tokens and their probabilities over the full vocabulary, ``[n_blocks, n_items, n_top]``.
    """
    best = [logit_lens(decoder, block).double().softmax(-1).topk(n_top) for block in states]
    probabilities, tokens = (torch.stack(parts).numpy() for parts in zip(*best, strict=True))
    return tokens, probabilities


def _word(decoder: Decoder, token: int) -> str:
    """Return a token's text with its spaces, line breaks and other blanks made visible."""
    text: str = decoder.tokenizer.decode([token])
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    seen = [sign if sign.isprintable() else f"U+{ord(sign):04X}" for sign in shown]
    return "".join(seen) or f"token {token}"
