"""Extraction: the residual stream after chosen blocks at chosen positions, and the logit lens."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lib.engine.batches import equal_length_rows, plant_prompts, stack_prompts
from lib.engine.models import Decoder, evaluated, whole_numbers
from lib.engine.passes import forests_are_exact, run_batch
from lib.engine.progress import track
from lib.engine.replay import Forest, forests_hold_states, plant_rest

Prompts = Sequence[Sequence[int] | np.ndarray | Tensor] | np.ndarray | Tensor
"""Token ids: one list, array or tensor a prompt, or one array or tensor `[n_prompts, length]`."""

Positions = Literal["last"] | Sequence[int] | np.ndarray
BATCH_TOKENS = 1024


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
    """Return each text's token ids, with the special tokens that the tokenizer adds by default.

    Raises:
        ValueError: no texts, or something else than a list of them.
    """
    given = [] if isinstance(texts, str) else list(texts)
    if not given or not all(isinstance(text, str) for text in given):
        raise ValueError("Texts are a list of strings, at least one; of a single text, [text].")
    return [list(ids) for ids in decoder.tokenizer(given)["input_ids"]]


@evaluated
def extract_residuals(
    decoder: Decoder,
    prompts: Prompts,
    *,
    positions: Positions = "last",
    blocks: Sequence[int] | None = None,
    logits: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    forests: list[Forest] | None = None,
    description: str | None = None,
) -> Residuals:
    """Return the residual stream after each block at one position of each prompt.

    A beginning that prompts share is run once: prompts lie side by side as paths through a forest
    of tokens, each seeing its own path alone, if a comparison finds that exact for the model. Else
    prompts of the same length share a batch, so nothing is padded and no position shifts. Memory:
    one batch of at most `batch_tokens` tokens beside the result.

    Args:
        decoder: the model.
        prompts: token ids; lengths may differ.
        positions: `"last"`, or one index per prompt (negative counts from the prompt's end).
        blocks: which blocks, all by default; `()` for none (logits alone).
        logits: also return the next-token logits of the last token.
        batch_tokens: most tokens in one forward pass.
        forests: as in `sweep_blocks`: what is to be edited later is run once, here.
        description: what a progress display calls this; None shows none.

    Raises:
        ValueError: no prompts, an empty prompt or one that the model cannot read, a block or
            position that does not exist, or results that are not finite (prompt and block named).
    """
    wanted = check_blocks(decoder, blocks)
    prompts = check_prompts(decoder, prompts)
    where = check_positions(prompts, positions)
    states = torch.empty(len(wanted), len(prompts), decoder.d_model)
    all_logits = torch.empty(len(prompts), decoder.d_vocab) if logits else None
    ends = [len(prompt) - 1 for prompt in prompts]
    last = decoder.n_blocks - 1
    needed = {*wanted, *([last] if logits else [])}
    for rows, picked in iterate_states(
        decoder, prompts, torch.tensor([where, ends]), needed, batch_tokens, forests, description
    ):
        for index, block in enumerate(wanted):
            states[index, rows] = picked[block][0].float().cpu()
        if all_logits is not None:
            with torch.inference_mode():
                normed = decoder.final_norm(picked[last][1])
                all_logits[rows] = decoder.unembed(normed).float().cpu()
    check_finite(states, lambda block, row, _: f"State of prompt {row} after block {wanted[block]}")
    if all_logits is not None:
        check_finite(all_logits, lambda row, _: f"Logits of prompt {row}")
    return Residuals(states, wanted, all_logits)


def check_finite(values: Tensor, name: Callable[..., str]) -> None:
    """Refuse what a model put out unless it is finite; `name` says what stands at an index."""
    # A sum is not finite either, and costs neither time nor memory.
    if not math.isfinite(float(values.sum())) and not bool((finite := values.isfinite()).all()):
        raise ValueError(
            f"{name(*(~finite).nonzero()[0].tolist())}: not finite, it or a prompt that ran beside "
            "it; load the model in another dtype, such as float32 or bfloat16, or look for what "
            "damaged its weights."
        )


def iterate_states(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    places: Tensor,
    blocks: set[int],
    batch_tokens: int = BATCH_TOKENS,
    forests: list[Forest] | None = None,
    description: str | None = None,
) -> Iterator[tuple[np.ndarray, dict[int, Tensor]]]:
    """Yield, batch by batch, indices of prompts `[n]` and `{block: states [k, n, d_model]}`.

    The states are those at `places` `[k, n_prompts]`, none of them negative, in the model's dtype.
    """
    planted, batches = None, []
    if not forests_are_exact(decoder, prompts):
        batches = [stack_prompts(prompts, r) for r in equal_length_rows(prompts, batch_tokens)]
    elif forests is None or not forests_hold_states(decoder, max(prompts, key=len)):
        batches = plant_prompts(prompts, range(len(prompts)), batch_tokens)
    else:
        rows = np.arange(len(prompts))
        planted = plant_rest(decoder, prompts, rows, forests, batch_tokens)
        batches = planted.batches
    for number, batch in enumerate(track(batches, description) if description else batches):
        if planted is None:
            yield batch.rows, run_batch(decoder, batch, blocks, places)
        else:
            yield batch.rows, planted.run(decoder, number).states_of(blocks, places)


def logit_lens(decoder: Decoder, states: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
    """Return the logits `[..., d_vocab]` that final norm and unembedding read from `states`.

    `states` is `[..., d_model]`; with `token_ids` the last axis holds those tokens alone. At the
    last block the lens is the model's own output. Source: nostalgebraist, "interpreting GPT: the
    logit lens" (2020). ValueError names a token that the model does not score.
    """
    with torch.inference_mode():
        normed = decoder.final_norm(states.to(decoder.dtype))
        return decoder.unembed(normed, token_ids).float().cpu()


def check_blocks(decoder: Decoder, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """Return the blocks asked for, all by default; ValueError names one that cannot be meant."""
    wanted = tuple(range(decoder.n_blocks) if blocks is None else whole_numbers("Blocks", blocks))
    for place, block in enumerate(wanted):
        if not 0 <= block < decoder.n_blocks:
            raise ValueError(
                f"Block {block} does not exist: {decoder.name} has blocks 0 to "
                f"{decoder.n_blocks - 1}."
            )
        if block in wanted[:place]:
            raise ValueError(f"Block {block} is asked for twice; name each block once.")
    return wanted


def check_prompts(decoder: Decoder, prompts: Prompts) -> list[list[int]]:
    """Return prompts as lists of token ids; ValueError names one that the model cannot read.

    Too long, of tokens that it does not know, of text, or with padding, which would count as a part
    of the prompt: prompts may differ in length and need none.
    """
    if isinstance(prompts, Mapping) or any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "Prompts are lists of token ids; turn texts into them by tokenize(decoder, texts)."
        )
    embedding: Tensor = decoder.model.get_input_embeddings().weight  # type: ignore[assignment]
    n_known = len(embedding)
    padding = _padding_token(decoder)
    checked = [_token_ids(index, prompt) for index, prompt in enumerate(prompts)]
    for index, prompt in enumerate(checked):
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
        if padding is not None and padding in (prompt[:1] + prompt[-1:]):
            whole = "is padding alone" if set(prompt) == {padding} else "is padded"
            raise ValueError(
                f"Prompt {index} {whole} (token {padding}); give token ids without padding, "
                "prompts may differ in length."
            )
    return checked


def _token_ids(index: int, prompt: Sequence[int] | np.ndarray | Tensor) -> list[int]:
    given: Any = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else prompt
    if not isinstance(given, Iterable):
        raise ValueError(f"Prompt {index} is {given!r}, no list of token ids; give [prompt].")
    given = list(given)
    try:
        return [operator.index(token) for token in given]
    except TypeError:
        raise ValueError(
            f"Prompt {index} is no list of token ids; its first entry is {given[0]!r}."
        ) from None


def _padding_token(decoder: Decoder) -> int | None:
    """Return the token that stands for padding and for nothing else."""
    names = ("bos_token_id", "eos_token_id", "unk_token_id")
    padding = getattr(decoder.tokenizer, "pad_token_id", None)
    others = [getattr(decoder.tokenizer, name, None) for name in names]
    return padding if isinstance(padding, int) and padding not in others else None


def check_positions(prompts: Prompts, positions: Positions) -> list[int]:
    """Return one non-negative position per prompt; ValueError names the prompt that has none."""
    if len(prompts) == 0:
        raise ValueError("No prompts were given; at least one is needed.")
    lengths = [len(prompt) for prompt in prompts]
    if isinstance(positions, str) and positions != "last":
        raise ValueError(f'Positions {positions!r}: give "last" or one index a prompt.')
    last = isinstance(positions, str)
    given = [-1] * len(prompts) if last else whole_numbers("Positions", positions)
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
