"""What the depth explorer shows of a task: map, transfer, correlation, top predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from lib.engine.extraction import logit_lens
from lib.engine.files import write_atomically
from lib.engine.models import Decoder
from lib.engine.store import recall_residuals
from lib.evidence.records import EXPLORATIONS, RECORDED, catalogue_place, run_folder
from lib.evidence.tasks import load_tasks, spread
from lib.evidence.transfer import ARMS, Trial, choose_pairs, measure_transfer, read_tasks
from lib.science.correlation import correlate
from lib.science.curves import crossing
from lib.science.estimate import Estimate, Measured, Untested
from lib.science.geometry import angles, jeffreys_divergence

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

N_SHOWN, N_TOP = 30, 5
ANGLE, TWIN = "angle", "angle, untrained"


@dataclass(frozen=True, eq=False)
class Exploration:
    """One task at every block: prompts of its first template.

    Attributes:
        model: the model.
        name: the task.
        texts: the prompts shown `[n_items]`.
        answers: each prompt's right answer `[n_items]`.
        positions: where each lies on the map, −1 … 1 `[n_blocks, n_items, 2]`.
        shown: share of the directions' spread that the map's plane shows `[n_blocks]`.
        curves: columns `curve` (both arms, the angle's correlation, the same untrained), `block`,
            `estimate`, `low`, `high`.
        transition: ℓ*, or None where the arms do not cross.
        top_tokens: the most probable next tokens that the logit lens reads at the last token, best
            first `[n_blocks, n_items, N_TOP]`.
        top_probabilities: their probabilities over the full vocabulary, the same shape.
        right_tokens: the token that each right answer begins with `[n_items]`.
        words: how each of these tokens is written.
    """

    model: str
    name: str
    texts: Sequence[str]
    answers: Sequence[str]
    positions: FloatArray
    shown: FloatArray
    curves: pd.DataFrame
    transition: float | None
    top_tokens: IntArray
    top_probabilities: FloatArray
    right_tokens: IntArray
    words: Mapping[int, str]


def keep_explorations(explorations: Sequence[Exploration]) -> None:
    """Keep what was found in the folder of the model's run, from which it can be recorded."""
    for model in {one.model for one in explorations}:
        own = [to_plain(one) for one in explorations if one.model == model]
        text = json.dumps(own, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        write_atomically(run_folder(model) / EXPLORATIONS, text + "\n")


def recorded_explorations(but: str) -> list[Exploration]:
    """Return what is recorded of other models than the one named, in the catalogue's order."""
    files = sorted(RECORDED.glob(f"*.{EXPLORATIONS}"))
    every = [one for file in files for one in json.loads(file.read_text(encoding="utf-8"))]
    every.sort(key=lambda one: catalogue_place(one["model"]))
    return [from_plain(one) for one in every if one["model"] != but]


def to_plain(one: Exploration) -> dict[str, Any]:
    """Return an exploration as JSON knows it, numbers rounded to what the page can show."""
    plain = vars(one) | {"curves": one.curves.round(4).to_dict("list")}
    for name in ("positions", "shown", "top_probabilities"):
        plain[name] = np.round(plain[name], 4).tolist()
    for name in ("top_tokens", "right_tokens"):
        plain[name] = plain[name].tolist()
    return plain


def from_plain(plain: Mapping[str, Any]) -> Exploration:
    """Return what `to_plain` was given, but for the rounding."""
    told = dict(plain) | {"curves": pd.DataFrame(plain["curves"])}
    told["words"] = {int(token): word for token, word in plain["words"].items()}
    for name in ("positions", "shown", "top_probabilities", "top_tokens", "right_tokens"):
        told[name] = np.array(plain[name])
    return Exploration(**told)


def explore_tasks(decoder: Decoder, twin: Decoder, names: Sequence[str]) -> list[Exploration]:
    """Return the tasks among `names` whose switch can be measured on this model."""
    trials = read_tasks(decoder, load_tasks(decoder, names))
    return [
        explore_trial(trial, twin)
        for trial in trials.values()
        if isinstance(trial, Trial) and not isinstance(choose_pairs(trial), Untested)
    ]


def explore_trial(trial: Trial, twin: Decoder) -> Exploration:
    """Return what the explorer shows of one task.

    The arms are those of all pairs, as the phase-transition chapter measures them, so that its
    sweeps are recalled; map, predictions and correlation are those of the first template, the
    correlation over all of its prompts, map and predictions of every so many.

    Raises:
        ValueError: fewer than three prompts, a state without a direction.
    """
    decoder, task = trial.decoder, trial.task
    pairs = choose_pairs(trial)
    assert not isinstance(pairs, Untested)  # such tasks are left out before
    arms = {arm: measure_transfer(trial, pairs, site).estimate() for arm, site in ARMS.items()}
    rows = np.flatnonzero(task.prompts["template"] == task.prompts["template"].iloc[0])
    tokens = [task.tokens[row] for row in rows]
    states = recall_residuals(decoder, tokens).states
    curves: dict[str, Measured] = dict(arms)  # type: ignore[arg-type]
    curves[ANGLE] = _code(decoder, states, task.units)
    curves[TWIN] = _code(twin, recall_residuals(twin, tokens).states, task.units)
    found = [
        one.to_frame().assign(curve=c) for c, one in curves.items() if isinstance(one, Estimate)
    ]
    context, prediction = arms.values()
    place = None
    if isinstance(context, Estimate) and isinstance(prediction, Estimate):
        crossed = crossing(context.value[:-1], prediction.value[:-1])  # as the chapter
        place = None if np.isnan(crossed) else crossed
    chosen = spread(len(rows), N_SHOWN)
    prompts = task.prompts.iloc[rows[chosen]]
    positions, shown = depth_positions(states[:, chosen])
    top, probabilities = top_predictions(decoder, states[:, chosen])
    right = task.answer_ids[prompts["answer_index"]]
    return Exploration(
        model=decoder.name,
        name=task.name,
        texts=prompts["text"].tolist(),
        answers=prompts["answer"].tolist(),
        positions=positions,
        shown=shown,
        curves=pd.concat(found)[["curve", "block", "estimate", "low", "high"]],
        transition=place,
        top_tokens=top,
        top_probabilities=probabilities,
        right_tokens=right,
        words={t: _word(decoder, t) for t in {*top.ravel().tolist(), *right.tolist()}},
    )


def _code(decoder: Decoder, states: Tensor, units: str) -> Measured:
    """Return ρ(θ, J) at each block, of states `[n_blocks, n_items, d_model]`."""
    divergence = jeffreys_divergence(logit_lens(decoder, states[-1]).numpy())
    return correlate([angles(block.numpy()) for block in states], divergence, units)


def depth_positions(states: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return each block's items in the plane that shows most of how their directions differ.

    The two first principal components of the centred directions h / |h|. A block's plane may be
    turned and mirrored at will, so each is turned to lie as near as it can to the next block's
    (orthogonal Procrustes), from the last block backwards; each is scaled to fill its map.

    Args:
        states: `[n_blocks, n_items, d_model]`.

    Returns:
        Positions `[n_blocks, n_items, 2]` in −1 … 1, and the share of the spread that the plane
        shows `[n_blocks]`.

    Raises:
        ValueError: fewer than three items, a zero state, directions that are all equal.
    """
    blocks = np.asarray(states, dtype=np.float64)
    if blocks.shape[1] < 3:
        raise ValueError(f"A map needs at least 3 items; got {blocks.shape[1]}.")
    positions = np.zeros((*blocks.shape[:2], 2))
    shown = np.zeros(len(blocks))
    following: FloatArray | None = None
    for block in reversed(range(len(blocks))):
        norms = np.linalg.norm(blocks[block], axis=1, keepdims=True)
        if not norms.all():
            raise ValueError(f"block {block}: item {int(np.argmin(norms))} has norm 0.")
        directions = blocks[block] / norms
        centred = directions - directions.mean(axis=0)
        left, values, _ = np.linalg.svd(centred, full_matrices=False)
        if values[0] < 1e-9:  # all directions are equal: they lie at one place, shown whole
            shown[block] = 1.0
            continue
        plane = left[:, :2] * values[:2]
        if following is None:
            signs = np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]])
            plane = plane * np.where(signs == 0, 1, signs)
        else:
            plane = plane @ orthogonal_procrustes(plane, following)[0]
        following = plane / np.abs(plane).max()
        positions[block] = following
        shown[block] = np.square(values[:2]).sum() / np.square(values).sum()
    return positions, shown


def top_predictions(decoder: Decoder, states: Tensor) -> tuple[IntArray, FloatArray]:
    """Return the most probable next tokens that the logit lens reads from states, best first.

    Args:
        decoder: the model.
        states: the residual stream after each block `[n_blocks, n_items, d_model]`.

    Returns:
        Tokens and their probabilities over the full vocabulary `[n_blocks, n_items, N_TOP]`.
    """
    best = [logit_lens(decoder, block).double().softmax(-1).topk(N_TOP) for block in states]
    probabilities, tokens = (torch.stack(parts).numpy() for parts in zip(*best, strict=True))
    return tokens, probabilities


def _word(decoder: Decoder, token: int) -> str:
    """Return a token's text with its spaces, line breaks and other blanks made visible."""
    text: str = decoder.tokenizer.decode([token])
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    seen = [sign if sign.isprintable() else f"U+{ord(sign):04X}" for sign in shown]
    return "".join(seen) or f"token {token}"
