"""Forward passes over batches of prompts, and whether they may share what they begin with."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from operator import ge
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lib.engine.batches import Batch, lay_out
from lib.engine.models import Decoder, evaluated
from lib.engine.structure import untuple

Key = TypeVar("Key")
Value = TypeVar("Value")
Known = WeakKeyDictionary[object, dict[str, dict[Key, Value]]]
"""What was found, such as whether a way is exact: by `checked_as` of the model, and attention."""

Inputs = dict[str, Any]
"""What a block is called with: the residual stream as `hidden`, all else by name in `others`."""

Sizes = tuple[int, ...]
"""Of what was compared, such as the tokens of a prompt: smaller ones are no other case."""

REFUSALS = (RuntimeError, TypeError, AttributeError, ValueError, IndexError)
"""How a model says that it cannot be run in a faster way; a slower one is always right."""

ROOM = 32
"""Ways are compared on prompts of a multiple of as many tokens, so that few lengths are."""
_forests: Known[Sizes, bool] = WeakKeyDictionary()
_generated: Known[tuple[str, frozenset[int]], bool] = WeakKeyDictionary()


def run_blocks(decoder: Decoder, tokens: Tensor, blocks: set[int]) -> dict[int, Tensor]:
    """Run equal-length prompts `[n, length]`; return `{block: states [n, length, d_model]}`.

    The hooks are removed when the pass ends, after an exception too.
    """
    with _capture(decoder, blocks) as captured, torch.inference_mode():
        # The base model stops before the unembedding, which would cover every position.
        decoder.model.base_model(tokens, use_cache=False)
    return captured


def run_batch(
    decoder: Decoder, batch: Batch, blocks: set[int], places: Tensor
) -> dict[int, Tensor]:
    """Return `{block: states [k, n, d_model]}` of a batch, at `places` `[k, n_prompts]`."""
    columns = batch.columns.gather(1, places[:, batch.rows].T).T

    def pick(states: Tensor) -> Tensor:
        return states[batch.lines, columns]

    with _capture(decoder, blocks, pick) as captured, torch.inference_mode():
        decoder.model.base_model(use_cache=False, **inputs_of(decoder, batch))
    return captured


def inputs_of(decoder: Decoder, batch: Batch) -> dict[str, Tensor]:
    """Return what a model is called with to run a batch."""
    inputs = {"input_ids": batch.tokens.to(decoder.device)}
    if batch.seen is not None and batch.depths is not None:
        lowest = torch.finfo(decoder.dtype).min
        mask = torch.zeros(batch.seen.shape, dtype=decoder.dtype).masked_fill(~batch.seen, lowest)
        inputs["attention_mask"] = mask[:, None].to(decoder.device)
        inputs["position_ids"] = batch.depths.to(decoder.device)
    return inputs


@evaluated
def forests_are_exact(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> bool:
    """Compare, once for a model and again for longer prompts, a forest with each prompt alone.

    The longest prompt, one that leaves it halfway and it read backwards, on two lines of one pass:
    some attentions keep prompts apart on a single line alone. A model on which a user's hooks lie
    (steering among them) runs prompts as they are, since a hook may count tokens.
    """
    if has_hooks(decoder):
        return False
    longest = list(max(prompts, key=lambda prompt: len(list(prompt))))

    def compare(length: int) -> bool:
        one, half, last = lengthened(decoder, longest, length), length // 2, {decoder.n_blocks - 1}
        three = [one, one[:half] + one[half:][::-1], one[::-1]]
        batch = lay_out(three, [[(0, 0), (1, half)], [(2, 0), (1, 0)]])
        columns = batch.columns.to(decoder.device)
        alone = run_blocks(decoder, torch.tensor(three, device=decoder.device), last)
        try:
            with _capture(decoder, last) as together, torch.inference_mode():
                decoder.model.base_model(use_cache=False, **inputs_of(decoder, batch))
        except REFUSALS:
            return False  # no place or mask of each token's own (ALiBi, state-space)
        (slow,), (fast,) = alone.values(), together.values()
        slow, fast = slow[batch.rows], fast[batch.lines[:, None], columns]
        # A state that is far larger than the others, an attention sink's, must not speak for them.
        return all(agree(slow[:, place], fast[:, place]) for place in range(length))

    return holds(decoder, _forests, compare, len(longest))


def has_hooks(decoder: Decoder) -> bool:
    """Say whether hooks lie anywhere in the model, but for those that transformers leaves."""
    return bool(_hooks(decoder, "transformers."))


def _hooks(decoder: Decoder, *but: str) -> frozenset[int]:
    """Return the numbers of the hooks in a model, which torch never gives twice.

    Left out are hooks that modules of some names put there.
    """
    return frozenset(
        number
        for module in decoder.model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith(but)
    )


@evaluated
def generation_is_exact(decoder: Decoder, way: Literal["cache", "padding"]) -> bool:
    """Compare, once for a model, a few tokens run at once with the same tokens as `generate` runs.

    That is one after the other by the model's own cache, or behind padding on the left. A state
    that is carried from token to token may take padding in, or be handed on wrongly. Under each set
    of a user's hooks it is compared anew (what steers does not count): they may count tokens.
    """
    known = known_of(_generated, decoder)
    asked = way, _hooks(decoder, "transformers.", "lib.engine.generation")
    if asked not in known:
        tokens = torch.arange(1, 8, device=decoder.device)[None] % decoder.d_vocab
        last, run = {decoder.n_blocks - 1}, decoder.model.base_model
        whole = run_blocks(decoder, tokens, last)
        try:
            with _capture(decoder, last) as parts, torch.inference_mode():
                if way == "cache":
                    cache = run(tokens[:, :5], use_cache=True).past_key_values
                    run(tokens[:, 5:6], past_key_values=cache, use_cache=True)
                    run(tokens[:, 6:], past_key_values=cache, use_cache=True)
                else:
                    padded = torch.cat([torch.zeros_like(tokens[:, :3]), tokens], dim=1)
                    mask = torch.ones_like(padded)
                    mask[:, :3] = 0
                    told: dict[str, Any] = {"attention_mask": mask}
                    if "position_ids" in inspect.signature(run.forward).parameters:
                        told["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
                    run(padded, use_cache=False, **told)
        except REFUSALS:
            known[asked] = False
            return False
        (slow,), (fast,) = whole.values(), parts.values()
        known[asked] = agree(slow[:, -1], fast[:, -1])
    return known[asked]


def holds(
    decoder: Decoder,
    known: Known[Sizes, bool],
    compare: Callable[..., bool],
    n_tokens: int,
    *parts: int,
) -> bool:
    """Say whether what `compare` finds of a model holds for a prompt, or for parts of it.

    It is asked of a longer prompt first, and parts of half of it, so that the prompts that follow
    need no asking; of the prompt's own sizes only where it does not hold there. Under a user's
    hooks it is asked anew each time.
    """
    found = {} if has_hooks(decoder) else known_of(known, decoder)
    sizes = (n_tokens, *parts)
    if any(exact and all(map(ge, others, sizes)) for others, exact in found.items()):
        return True
    more = min(-(-n_tokens // ROOM) * ROOM, decoder.context_length or n_tokens)
    for asked in dict.fromkeys(((more, *(max(more // 2, part) for part in parts)), sizes)):
        if asked not in found:
            found[asked] = compare(*asked)
        if found[asked]:
            return True
    return False


def lengthened(decoder: Decoder, prompt: Sequence[int], length: int) -> list[int]:
    """Return a prompt followed by tokens unlike its own, `length` in all."""
    n_known = len(decoder.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    own = [int(token) for token in prompt]
    return [(own[place % len(own)] + place // len(own)) % n_known for place in range(length)]


def known_of(known: Known[Key, Value], decoder: Decoder) -> dict[Key, Value]:
    """Return what is known of a model with the attention that it has now."""
    attention = str(getattr(decoder.model.config, "_attn_implementation", ""))
    return known.setdefault(checked_as(decoder), {}).setdefault(attention, {})


class _Twins:
    """Untrained twins of one architecture, in one dtype on one device."""


_twins: dict[tuple[Any, ...], _Twins] = {}


def checked_as(decoder: Decoder) -> object:
    """Return what the checks of a model hold for: itself, or all its untrained twins.

    Trained weights may be such that rounding grows, so a trained model is checked by itself. Twins
    differ by their seeds alone: one speaks for all that are built of the same modules.
    """
    if not decoder.untrained:
        return decoder
    model = decoder.model
    built = tuple((name, type(module)) for name, module in model.named_modules())
    told = (model.config.to_json_string(), decoder.dtype, decoder.device, built)
    return _twins.setdefault(told, _Twins())


def agree(slow: Tensor, fast: Tensor) -> bool:
    """Say whether two ways of computing the same states differ by rounding alone."""
    tolerance = 1e-4 if slow.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((slow - fast).abs().max() <= tolerance * slow.abs().max())


@contextlib.contextmanager
def watching(
    decoder: Decoder, blocks: Sequence[int] | range, note: Callable[[int, Inputs], None]
) -> Iterator[None]:
    """Call `note(block, {"hidden", "others", "output"})` after each call of the blocks."""

    def keep(index: int) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            note(index, {**as_call(module, args, kwargs), "output": untuple(output)})

        return hook

    with contextlib.ExitStack() as stack:
        for index in blocks:
            block = decoder.blocks[index]
            stack.callback(block.register_forward_hook(keep(index), with_kwargs=True).remove)
        yield


def as_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return a block's inputs by name: the residual stream as `hidden`, the `others` apart."""
    names = list(inspect.signature(module.forward).parameters)
    others = {**dict(zip(names, args, strict=False)), **kwargs}
    return {"hidden": others.pop(names[0]), "others": others}


@contextlib.contextmanager
def _capture(
    decoder: Decoder, blocks: set[int], pick: Callable[[Tensor], Tensor] = lambda states: states
) -> Iterator[dict[int, Tensor]]:
    """Keep what `pick` takes of what the blocks put out while the context lasts; all by default."""
    captured: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured[block] = pick(untuple(output))

        return hook

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(decoder.blocks[block].register_forward_hook(keep(block)))
        yield captured
