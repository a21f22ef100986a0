"""Extraction: the residual stream after chosen blocks at chosen positions, and the logit lens."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lib.models import Decoder
from lib.progress import track
from lib.structure import untuple

Positions = Literal["last"] | Sequence[int] | np.ndarray
BATCH_TOKENS = 2048
SHARED_LEAST = 0.25  # of a prompt's tokens, for a pass of their own to pay
_compared: WeakKeyDictionary[Decoder, dict[int, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Residuals:
    """Residual streams at one position per prompt.

    Attributes:
        states: `[n_blocks, n_prompts, d_model]`, float32, on the CPU, in the order of `blocks`.
        blocks: the blocks they follow.
        logits: next-token logits at each prompt's last token `[n_prompts, d_vocab]`, or None.
    """

    states: Tensor
    blocks: tuple[int, ...]
    logits: Tensor | None = None


def tokenize(decoder: Decoder, texts: Sequence[str]) -> list[list[int]]:
    """Return each text's token ids, with the special tokens that the tokenizer adds by default."""
    return [list(ids) for ids in decoder.tokenizer(list(texts))["input_ids"]]


def extract_residuals(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    positions: Positions = "last",
    blocks: Sequence[int] | None = None,
    logits: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    description: str | None = None,
) -> Residuals:
    """Return the residual stream after each block at one position of each prompt.

    Prompts of the same length share a batch, so nothing is padded and no position shifts. Memory:
    one batch of at most `batch_tokens` tokens beside the result.

    Args:
        decoder: the model.
        prompts: token ids; lengths may differ.
        positions: `"last"`, or one index per prompt (negative counts from the prompt's end).
        blocks: which blocks, all by default; `()` for none (logits alone).
        logits: also return the next-token logits of the last token.
        batch_tokens: most tokens in one forward pass.
        description: what a progress display calls this; None shows none.

    Raises:
        ValueError: no prompts, an empty prompt or one that the model cannot read, or a block or
            position that does not exist.
    """
    wanted = check_blocks(decoder, blocks)
    where = check_positions(prompts, positions)
    check_prompts(decoder, prompts)
    states = torch.empty(len(wanted), len(prompts), decoder.d_model)
    all_logits = torch.empty(len(prompts), decoder.d_vocab) if logits else None
    batches = list(equal_length_batches(prompts, batch_tokens))
    for rows in track(batches, description) if description else batches:
        tokens = torch.tensor([list(prompts[row]) for row in rows], device=decoder.device)
        chosen = torch.tensor([where[row] for row in rows])
        last = decoder.n_blocks - 1
        captured = run_blocks(decoder, tokens, {*wanted, *([last] if logits else [])})
        for index, block in enumerate(wanted):
            picked = captured[block][torch.arange(len(rows)), chosen]
            states[index, rows] = picked.float().cpu()
        if all_logits is not None:
            with torch.inference_mode():
                normed = decoder.final_norm(captured[last][:, -1:])
                all_logits[rows] = decoder.unembed(normed)[:, 0].float().cpu()
    return Residuals(states, wanted, all_logits)


def logit_lens(decoder: Decoder, states: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
    """Return the logits `[..., d_vocab]` that final norm and unembedding read from `states`.

    `states` is `[..., d_model]`; with `token_ids` the last axis holds those tokens alone. At the
    last block the lens is the model's own output. Source: nostalgebraist, "interpreting GPT: the
    logit lens" (2020).
    """
    with torch.inference_mode():
        normed = decoder.final_norm(states.to(decoder.dtype))
        return decoder.unembed(normed, token_ids).float().cpu()


def run_blocks(decoder: Decoder, tokens: Tensor, blocks: set[int]) -> dict[int, Tensor]:
    """Run equal-length prompts `[n, length]`; return `{block: states [n, length, d_model]}`.

    Tokens with which all prompts begin are run once, where that is found to be exact. The hooks are
    removed when the pass ends, after an exception too.
    """
    if n_shared := count_shared(decoder, tokens):
        return _run_shared(decoder, tokens, n_shared, blocks)
    with _capture(decoder, blocks) as captured, torch.inference_mode():
        # The base model stops before the unembedding, which would cover every position.
        decoder.model.base_model(tokens, use_cache=False)
    return captured


def count_shared(decoder: Decoder, tokens: Tensor) -> int:
    """Return how many tokens of `[n, length]` can be run once for all; 0 where it does not pay.

    Prompts that begin alike share them, all but the last token at most, where the model's keys and
    values can be handed on exactly.
    """
    alike = (tokens == tokens[:1]).all(dim=0)
    n_shared = min(int(alike.int().cumprod(dim=0).sum()), tokens.shape[1] - 1)
    pays = len(tokens) > 1 and n_shared >= SHARED_LEAST * tokens.shape[1]
    return n_shared if pays and _sharing_is_exact(decoder, tokens, n_shared) else 0


def _run_shared(
    decoder: Decoder, tokens: Tensor, n_shared: int, blocks: set[int]
) -> dict[int, Tensor]:
    """Return `run_blocks` from one pass over the shared tokens and one over the others."""
    cache = DynamicCache(config=decoder.model.config.get_text_config())
    with torch.inference_mode():
        with _capture(decoder, blocks) as before:
            decoder.model.base_model(tokens[:1, :n_shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(tokens))
        with _capture(decoder, blocks) as after:
            decoder.model.base_model(tokens[:, n_shared:], past_key_values=cache, use_cache=True)
        return {
            block: torch.cat([before[block].expand(len(tokens), -1, -1), after[block]], dim=1)
            for block in blocks
        }


def _sharing_is_exact(decoder: Decoder, tokens: Tensor, n_shared: int) -> bool:
    """Compare, once for a model and again for longer prompts, on the first and the last prompt."""
    length = tokens.shape[1]
    known = _compared.setdefault(decoder, {})
    if any(exact and longer >= length for longer, exact in known.items()):
        return True
    if length not in known:
        two, last = tokens[[0, -1]], {decoder.n_blocks - 1}
        with _capture(decoder, last) as whole, torch.inference_mode():
            decoder.model.base_model(two, use_cache=False)
        try:
            shared = _run_shared(decoder, two, n_shared, last)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            known[length] = False  # no keys and values to share (a state-space model, say)
            return False
        (slow,), (fast,) = whole.values(), shared.values()
        tolerance = 1e-4 if slow.dtype in (torch.float32, torch.float64) else 5e-2
        known[length] = bool((slow - fast).abs().max() <= tolerance * slow.abs().max())
    return known[length]


@contextlib.contextmanager
def _capture(decoder: Decoder, blocks: set[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what the blocks put out while the context lasts."""
    captured: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured[block] = untuple(output)

        return hook

    handles = [decoder.blocks[block].register_forward_hook(keep(block)) for block in blocks]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def equal_length_batches(
    prompts: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[list[int]]:
    """Yield lists of prompt indices of one length each, at most `batch_tokens` tokens a list."""
    lengths = np.array([len(prompt) for prompt in prompts])
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        size = max(1, batch_tokens // int(length))
        for start in range(0, len(rows), size):
            yield rows[start : start + size].tolist()


def check_blocks(decoder: Decoder, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """Return the blocks asked for, all by default; ValueError names one that does not exist."""
    wanted = tuple(range(decoder.n_blocks)) if blocks is None else tuple(int(b) for b in blocks)
    for block in wanted:
        if not 0 <= block < decoder.n_blocks:
            raise ValueError(
                f"Block {block} does not exist: {decoder.name} has blocks 0 to "
                f"{decoder.n_blocks - 1}."
            )
    return wanted


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Check that prompts fit the model; ValueError names one that is too long or unknown to it."""
    embedding: Tensor = decoder.model.get_input_embeddings().weight  # type: ignore[assignment]
    n_known = len(embedding)
    for index, prompt in enumerate(prompts):
        if decoder.context_length is not None and len(prompt) > decoder.context_length:
            raise ValueError(
                f"Prompt {index} has {len(prompt)} tokens, but {decoder.name} reads at most "
                f"{decoder.context_length}; shorten it."
            )
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < n_known:
            wrong = next(token for token in prompt if not 0 <= token < n_known)
            raise ValueError(
                f"Prompt {index} holds token {wrong}, but {decoder.name} embeds tokens 0 to "
                f"{n_known - 1}; use the tokenizer that belongs to the model."
            )


def check_positions(prompts: Sequence[Sequence[int]], positions: Positions) -> list[int]:
    """Return one non-negative position per prompt; ValueError names the prompt that has none."""
    if len(prompts) == 0:
        raise ValueError("No prompts were given; at least one is needed.")
    lengths = [len(prompt) for prompt in prompts]
    given = [-1] * len(prompts) if isinstance(positions, str) else [int(p) for p in positions]
    if len(given) != len(prompts):
        raise ValueError(f"{len(given)} positions for {len(prompts)} prompts; give one each.")
    for index, (length, position) in enumerate(zip(lengths, given, strict=True)):
        if length == 0:
            raise ValueError(f"Prompt {index} is empty; it needs at least one token.")
        if not -length <= position < length:
            raise ValueError(
                f"Prompt {index} has {length} tokens; position {position} does not exist."
            )
    return [position % length for length, position in zip(lengths, given, strict=True)]
