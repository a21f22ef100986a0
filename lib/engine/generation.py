"""Generation: steer a decoder while it writes, with its cache of keys and values on.

An edit is tied to positions in each prompt. Whichever tokens a forward pass brings (a whole batch
of left-padded prompts, or one new token after a cache), only those positions are edited, once.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.engine.edits import Edit, apply_edit
from lib.engine.extraction import Prompts, check_blocks, check_prompts
from lib.engine.models import Decoder, evaluated, whole_numbers
from lib.engine.passes import generation_is_exact
from lib.engine.structure import untuple

Positions = Sequence[int | Sequence[int] | range]


@contextlib.contextmanager
def steer(
    decoder: Decoder, block: int, edit: Edit, donor: Tensor, positions: Positions
) -> Iterator[None]:
    """Edit the residual stream after `block` at given positions, in every pass inside the context.

    It works with `generate` below, with the model's own `generate` (greedy, sampled or beam search;
    of several sequences a prompt each is edited alike) and with plain forward passes, with or
    without a cache. Hooks leave with the context, after an exception too.

    Args:
        decoder: the model.
        block: after which block to edit.
        edit: a function of states and donors `[n, d_model]`, such as `Rotate(40)`.
        donor: what the edit takes: `[d_model]` for all prompts or `[n_prompts, d_model]`.
        positions: for each prompt of the batch one position, or several, counted from its first
            token, padding left out. Positions at or after the prompt's end are those of generated
            tokens: `range(len(prompt), 10**6)` steers all of them.

    Raises:
        ValueError: a block that does not exist, a donor of another shape, a position that is
            negative or no whole number; on a pass whose rows are neither the prompts nor repeats of
            each in turn; on leaving, a position that no pass reached (ranges excepted), so that no
            edit does nothing unnoticed.
    """
    check_blocks(decoder, [block])
    for way in ("cache", "padding"):  # compared now, since no edit may take part in it
        generation_is_exact(decoder, way)
    wanted = [_position_set(entry) for entry in positions]
    if not wanted:
        raise ValueError("No positions were given; give one entry for each prompt.")
    vectors = donor.expand(len(wanted), -1) if donor.dim() == 1 else donor
    if tuple(vectors.shape) != (len(wanted), decoder.d_model):
        raise ValueError(
            f"The donor has shape {tuple(donor.shape)}; expected [{decoder.d_model}] or "
            f"[{len(wanted)} prompts, {decoder.d_model}]."
        )
    first_column: list[int] = [0]
    padding: list[int] = []
    repeats = _Repeats(len(wanted))
    reached: set[tuple[int, int]] = set()

    def note_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {
            **dict(zip(inspect.signature(module.forward).parameters, args, strict=False)),
            **kwargs,
        }
        cache = named.get("past_key_values")
        first_column[0] = 0 if cache is None else int(cache.get_seq_length())
        padding[:] = _left_padding(named.get("attention_mask"))
        repeats.note(named.get("input_ids"), first_column[0])

    def change(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        states = untuple(output)
        n_each = repeats.of(states.shape[0])
        padded = padding or [0] * states.shape[0]
        prompt_of = [row // n_each for row in range(states.shape[0])]
        hits = [
            (row, column)
            for row, prompt in enumerate(prompt_of)
            for column in range(states.shape[1])
            if first_column[0] + column - padded[row] in wanted[prompt]
        ]
        if not hits:
            return None  # a hook that returns anything else would replace the output
        reached.update((prompt_of[r], first_column[0] + column - padded[r]) for r, column in hits)
        rows, columns = (
            torch.tensor(axis, device=states.device) for axis in zip(*hits, strict=True)
        )
        changed = states.clone()
        given = vectors.to(states)[rows // n_each]
        changed[rows, columns] = apply_edit(
            edit,
            states[rows, columns],
            given,
            f"The edit after block {block}",
            lambda item: f"prompt {prompt_of[hits[item][0]]}",
        )
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    # Both, since either may be what is called, and OPT's causal model passes its base model by.
    entries = dict.fromkeys([decoder.model, decoder.model.base_model])
    with contextlib.ExitStack() as hooks:
        for one in entries:
            hooks.enter_context(one.register_forward_pre_hook(note_pass, with_kwargs=True))
        hooks.enter_context(decoder.blocks[block].register_forward_hook(change))
        yield
    for row, chosen in enumerate(wanted):
        if isinstance(chosen, frozenset) and (
            missed := [p for p in chosen if (row, p) not in reached]
        ):
            raise ValueError(
                f"Position {min(missed)} of prompt {row} was in no pass, so nothing was edited; "
                "positions count from 0 at the prompt's first token."
            )


@evaluated
def generate(
    decoder: Decoder, prompts: Prompts, n_new_tokens: int, *, use_cache: bool = True
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, up to the model's end-of-text token.

    Prompts of different lengths share a batch: they are padded on the left, and position ids count
    from each prompt's first token. Inside `steer` the edit takes part.

    Args:
        decoder: the model.
        prompts: token ids.
        n_new_tokens: most tokens to add.
        use_cache: keep keys and values between tokens, where that is found to be exact; without,
            every token recomputes the whole text, which is slower and must give the same.

    Raises:
        ValueError: no prompts, an empty prompt, no tokens to add, or more than the model's context
            holds; prompts of different lengths for a state-space model.
    """
    prompts = check_prompts(decoder, prompts)
    if not prompts or min(len(prompt) for prompt in prompts) == 0 or n_new_tokens < 1:
        raise ValueError(
            f"Expected prompts of at least one token and n_new_tokens ≥ 1; got {len(prompts)} "
            f"prompts, {n_new_tokens} new tokens."
        )
    longest = max(len(prompt) for prompt in prompts)
    if decoder.context_length is not None and longest + n_new_tokens > decoder.context_length:
        raise ValueError(
            f"{longest} tokens and {n_new_tokens} new ones are more than the "
            f"{decoder.context_length} that {decoder.name} reads; shorten the prompt or add fewer."
        )
    takes_cache = "past_key_values" in inspect.signature(decoder.model.forward).parameters
    if min(len(prompt) for prompt in prompts) < longest and not (
        takes_cache and generation_is_exact(decoder, "padding")
    ):
        raise ValueError(
            f"{decoder.name} carries a state in place of keys and values, which padding would "
            "enter: give prompts of one length, or one prompt at a time."
        )
    use_cache = use_cache and takes_cache and generation_is_exact(decoder, "cache")
    pad = [[0] * (longest - len(prompt)) for prompt in prompts]
    text = torch.tensor([p + list(prompt) for p, prompt in zip(pad, prompts, strict=True)])
    mask = torch.tensor([p + [1] * len(t) for p, t in zip(pad, prompts, strict=True)])
    text, mask = text.to(decoder.device), mask.to(decoder.device)
    fresh, cache = text, None
    keeps = "logits_to_keep" in inspect.signature(decoder.model.forward).parameters
    last_logits = {"logits_to_keep": 1} if keeps else {}
    with torch.inference_mode():
        for _ in range(n_new_tokens):
            output = decoder.model(
                input_ids=fresh,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=use_cache,
                **_position_ids(decoder, mask, fresh.shape[1]),
                **last_logits,
            )
            best = output.logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, best], dim=1)
            mask = torch.cat([mask, torch.ones_like(best)], dim=1)
            cache = output.past_key_values if use_cache else None
            fresh = best if use_cache else text
    ends = _end_tokens(decoder)
    written = text[:, longest:].tolist()
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in written]


def _position_set(entry: int | Sequence[int] | range) -> range | frozenset[int]:
    if isinstance(entry, range):
        ends = [*entry[:1], *entry[-1:]]  # it may be long
    else:
        ends = whole_numbers("Positions", [entry] if np.ndim(entry) == 0 else entry)
    if min(ends, default=0) < 0:
        raise ValueError(
            f"Position {min(ends)} does not exist; positions count from 0 at a prompt's first "
            "token."
        )
    return entry if isinstance(entry, range) else frozenset(ends)


class _Repeats:
    """How many rows of a pass belong to each prompt: sampled sequences of one, or its beams."""

    def __init__(self, n_prompts: int) -> None:
        self.n_prompts = n_prompts
        self.alike = False
        self.length = 10**9

    def note(self, tokens: Tensor | None, first_column: int) -> None:
        """See, where a text begins, whether each prompt's rows begin with the same tokens."""
        if tokens is None or first_column or len(tokens) % self.n_prompts:
            return
        self.length = min(self.length, tokens.shape[1])  # what follows was written, by each its own
        rows = tokens[:, : self.length].reshape(self.n_prompts, -1, self.length)
        self.alike = bool((rows == rows[:, :1]).all())

    def of(self, n_rows: int) -> int:
        """Return the rows of each prompt in a pass of `n_rows`."""
        n_each = n_rows // self.n_prompts
        if n_rows != self.n_prompts * n_each or (n_each > 1 and not self.alike):
            raise ValueError(
                f"A pass brings {n_rows} rows, but positions were given for {self.n_prompts} "
                "prompts; give one entry for each row, or rows that repeat each prompt in turn, as "
                "num_return_sequences and num_beams do."
            )
        return n_each


def _left_padding(mask: Tensor | None) -> list[int]:
    """Return how many places each row's first token stands from the left; [] where none does."""
    if mask is None:
        return []
    if mask.dim() != 2:
        raise ValueError(
            f"The attention mask has {mask.dim()} dimensions; steering reads the padding from a "
            "mask [n_prompts, length]."
        )
    return mask.long().argmax(-1).tolist()


def _position_ids(decoder: Decoder, mask: Tensor, n_fresh: int) -> dict[str, Tensor]:
    """Return the position ids of the last `n_fresh` tokens, if the model takes any."""
    if "position_ids" not in inspect.signature(decoder.model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -n_fresh:]}


def _end_tokens(decoder: Decoder) -> set[int]:
    found = getattr(decoder.model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else {int(found)} if found is not None else set()
