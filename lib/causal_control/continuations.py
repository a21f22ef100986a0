"""What steering does to a text as a person reads it: unrelated continuations, top tokens, prose."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.causal_control.control_tables import Matched
from lib.causal_control.doses import METHODS, steer_states, steering_vectors
from lib.engine.extraction import tokenize
from lib.engine.generation import generate, steer
from lib.engine.interventions import exchange
from lib.engine.models import Decoder
from lib.engine.passes import run_blocks
from lib.engine.progress import track
from lib.engine.replay import (
    MAX_ROW_TOKENS,
    Prefix,
    ReplayUnsupportedError,
    replay_tokens,
    run_prefix,
    run_whole,
)
from lib.engine.steering import angle_degrees, held_out_centroids, rotation, unembedding_direction
from lib.engine.store import recall_residuals
from lib.evidence.arms import Trial
from lib.science.stats import bootstrap_interval, bootstrap_weights

NO_GROUP = -1


def continuation_losses(
    trials: Mapping[str, Trial],
    pairs: Mapping[str, np.ndarray],
    matched: Mapping[str, Matched],
    texts: pd.DataFrame,
    block: int,
    *,
    tasks_per_text: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how much steering in an unrelated text raises the loss on its continuation.

    The state of the context's last token is steered after `block` as a prompt of the task would be,
    towards one of its targets, at the dose at which the method flips half of the task's pairs
    (random plane and radial edit, which may never do so, at the rotation's dose). The loss is the
    mean over the continuation's tokens, in nats, less that of the unedited text.

    Args:
        trials: by task, judged by the right answers.
        pairs: by task, (recipient, donor) prompts `[n_pairs, 2]`; context i borrows pair i.
        matched: by task, from `match_flip_rate`.
        texts: columns `context` and `continuation`.
        block: after which to steer.
        tasks_per_text: tasks that lend their edit to each context, in turn; all by default.
        seed: of the random planes.

    Returns:
        One row per context, task and method: `context`, `task`, `method`, `loss_change`,
        `clean_loss`; a method whose matched dose is not reached is left out.
    """
    if not trials:
        return pd.DataFrame(columns=["context", "task", "method", "loss_change", "clean_loss"])
    decoder = next(iter(trials.values())).decoder
    contexts = tokenize(decoder, texts["context"].tolist())
    ends = tokenize(decoder, [f" {text}" for text in texts["continuation"]])
    states = recall_residuals(decoder, contexts).states[block]
    edited: list[list[Tensor]] = [[] for _ in contexts]
    labels: list[list[tuple[str, str]]] = [[] for _ in contexts]
    for number, (name, trial) in enumerate(trials.items()):
        vectors = _vectors_for(trial, pairs[name], states, block, seed=seed + number)
        for method, vector in vectors.items():
            dose = matched[name].dose(
                "rotation" if method in ("random plane", "radial") else method
            )
            if not np.isfinite(dose):
                continue
            for index, state in enumerate(steer_states(method, states, vector, dose)):
                if (number - index) % len(trials) < (tasks_per_text or len(trials)):
                    edited[index].append(state)
                    labels[index].append((name, method))
    rows = []
    for index in track(range(len(contexts)), "loss on continuations"):
        if not edited[index]:
            continue
        new = torch.stack([states[index], *edited[index]])
        losses = steered_losses(decoder, contexts[index], ends[index], new, block)
        for (name, method), loss in zip(labels[index], losses[1:], strict=True):
            rows.append((index, name, method, float(loss - losses[0]), float(losses[0])))
    return pd.DataFrame(rows, columns=["context", "task", "method", "loss_change", "clean_loss"])


def _vectors_for(
    trial: Trial, pairs: np.ndarray, states: Tensor, block: int, *, seed: int
) -> dict[str, Tensor]:
    """Return what each method acts with in unrelated texts, all templates fitted `[n, d_model]`."""
    chosen = pairs[np.linspace(0, len(pairs) - 1, len(states)).round().astype(int)]
    own = recall_residuals(trial.decoder, trial.task.tokens).states[[block]]
    ends = trial.target[chosen]
    template = trial.task.prompts["template"].to_numpy()
    source, target = (
        held_out_centroids(
            own, trial.target, template, ends[:, side], [NO_GROUP] * len(ends), trial.usable
        )[0]
        for side in (0, 1)
    )
    ids = trial.task.answer_ids[ends]
    return {
        "rotation": target,
        "additive": target - source,
        "unembedding": unembedding_direction(trial.decoder, states, ids[:, 1], ids[:, 0]),
        "random plane": torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)),
        "radial": states,
    }


def steered_losses(
    decoder: Decoder, context: Sequence[int], continuation: Sequence[int], new: Tensor, block: int
) -> Tensor:
    """Return the mean loss on a continuation, in nats a token, for each state put in its way.

    Args:
        decoder: the model.
        context: token ids, at least two.
        continuation: token ids, at least one.
        new: states of the context's last token after `block` `[n, d_model]`.
        block: after which they are put in.

    Returns:
        `[n]`, float64.
    """
    tokens = torch.tensor([[*context, *continuation[:-1]]], device=decoder.device)
    first, n_rows = len(context) - 1, max(1, MAX_ROW_TOKENS // len(continuation))
    wanted = torch.tensor(continuation, device=decoder.device)
    try:
        prefix, run = run_prefix(decoder, tokens, first), _replayed
        one = new[:1].repeat(2, 1)  # two rows, since side by side is what a block may refuse
        fast, slow = (way(decoder, prefix, one, block) for way in (_replayed, _recomputed))
        if float((fast - slow).abs().max()) > 1e-4 * float(slow.abs().max()):
            run = _recomputed
    except (ReplayUnsupportedError, RuntimeError, TypeError, AttributeError):
        prefix, run = run_whole(decoder, tokens, first), _recomputed
    losses = []
    for part in new.split(n_rows):
        with torch.inference_mode():
            logits = decoder.unembed(decoder.final_norm(run(decoder, prefix, part, block))).double()
            chosen = logits.gather(-1, wanted.expand(len(part), -1)[..., None])[..., 0]
            losses.append((logits.logsumexp(-1) - chosen).mean(-1).cpu())
    return torch.cat(losses)


def _replayed(decoder: Decoder, prefix: Prefix, new: Tensor, block: int) -> Tensor:
    rows = prefix.states[block].repeat(len(new), 1, 1)
    rows[:, 0] = new.to(rows)
    return replay_tokens(decoder, prefix, [block] * len(new), rows[None])[0]


def _recomputed(decoder: Decoder, prefix: Prefix, new: Tensor, block: int) -> Tensor:
    """Return what `_replayed` does by a full pass a state: for decoders without a shared cache."""
    last, found = decoder.n_blocks - 1, []
    for state in new:
        with steer(decoder, block, exchange, state, [prefix.first]):
            found.append(run_blocks(decoder, prefix.tokens, {last})[last][0, prefix.first :])
    return torch.stack(found)


def loss_table(losses: pd.DataFrame, *, n_draws: int, seed: int) -> pd.DataFrame:
    """Return the mean rise of the loss by method, each context the mean of its tasks.

    Columns `method`, `estimate`, `low`, `high`, `n` (contexts), in nats a token.
    """
    rows = []
    for method in METHODS:
        one = losses[losses["method"] == method].groupby("context")["loss_change"].mean()
        if len(one) >= 3:
            weights = bootstrap_weights(len(one), n_draws, np.random.default_rng(seed))
            found = bootstrap_interval(one.to_numpy(), weights)
            rows.append((method, found.estimate, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["method", "estimate", "low", "high", "n"])


def spread_texts(texts: pd.DataFrame, per_kind: int) -> pd.DataFrame:
    """Return the first `per_kind` texts of each kind."""
    return texts.groupby("kind", sort=False).head(per_kind).reset_index(drop=True)


# --- for the eye ---------------------------------------------------------------------------------


def read_before_and_after(
    trials: Mapping[str, Trial],
    pairs: Mapping[str, np.ndarray],
    block: int,
    *,
    n_top: int = 5,
    n_new_tokens: int = 6,
) -> pd.DataFrame:
    """Return what the model says before and after a rotation onto the target, a prompt a task.

    The last token's state is turned by its full angle to the target's centroid over the other
    templates, once; the greedy continuation runs on from there.

    Returns:
        Columns `prompt`, `turned to`, `degrees`, `top tokens before`, `top tokens after`,
        `continuation before`, `continuation after`.
    """
    rows: list[dict[str, Any]] = []
    for name, trial in trials.items():
        decoder, pair = trial.decoder, pairs[name][:1]
        states = recall_residuals(decoder, trial.task.tokens).states[[block]]
        target = steering_vectors(trial, pair, states)["rotation"][0, 0]
        degrees = float(angle_degrees(states[0, pair[0, 0]], target))
        prompt = trial.task.tokens[pair[0, 0]]

        def say(prompt: list[int] = prompt, decoder: Decoder = decoder) -> tuple[str, str]:
            return _top_tokens(decoder, prompt, n_top), _continue(decoder, prompt, n_new_tokens)

        before, written_before = say()
        with steer(decoder, block, rotation(degrees), target, [len(prompt) - 1]):
            after, written_after = say()
        rows.append(
            {
                "prompt": trial.task.prompts["text"][pair[0, 0]],
                "turned to": trial.task.prompts["answer"][pair[0, 1]],
                "degrees": f"{degrees:.0f}",
                "top tokens before": before,
                "top tokens after": after,
                "continuation before": written_before,
                "continuation after": written_after,
            }
        )
    return pd.DataFrame(rows)


def _top_tokens(decoder: Decoder, prompt: list[int], n_top: int) -> str:
    with torch.inference_mode():
        logits = decoder.model(torch.tensor([prompt], device=decoder.device)).logits[0, -1]
    best = logits.float().softmax(-1).topk(n_top)
    decode: Callable[[list[int]], str] = decoder.tokenizer.decode
    return ", ".join(
        f"{decode([int(token)]).strip() or repr(decode([int(token)]))} {float(share):.2f}"
        for share, token in zip(best.values, best.indices, strict=True)
    )


def _continue(decoder: Decoder, prompt: list[int], n_new_tokens: int) -> str:
    written = decoder.tokenizer.decode(generate(decoder, [prompt], n_new_tokens)[0])
    return " ".join(written.split())
