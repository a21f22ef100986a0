"""The parts of a block: attention, MLP and heads, found by what they do.

A block adds an attention's output and an MLP's output to the residual stream. The attention's is
its output projection of the heads' outputs side by side, so a head's output is a slice of that
projection's input. No architecture is named here. The parts are found by watching what the modules
of a block put out, and a block is taken only if they behave as parts: two outputs, times a common
factor, add up to the block's step; the heads alone carry what other tokens say; and each head is
what a mask of that head changes. Once attention has mixed the tokens, all of it acts on one token
alone, so a block can be run on tokens by themselves with the heads' outputs put in.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lib.engine.extraction import check_blocks
from lib.engine.models import Decoder, evaluated
from lib.engine.passes import (
    REFUSALS,
    Inputs,
    Known,
    agree,
    checked_as,
    known_of,
    run_blocks,
    watching,
)
from lib.engine.replay import FrozenCache
from lib.engine.structure import untuple

ROWS_AT_ONCE = 512
N_TOKENS = 5  # of the prompt on which a block's parts are looked for


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one block.

    Attributes:
        attention: the module whose output, times `multiplier`, is what the attention adds.
        mlp: the module whose output, times `multiplier`, is what the MLP adds.
        projection: the attention's output projection, whose input is the heads side by side.
        n_heads: number of heads.
        multiplier: what both outputs are multiplied by (Granite's residual multiplier; else 1).
    """

    attention: nn.Module
    mlp: nn.Module
    projection: nn.Module
    n_heads: int
    multiplier: float


_Named = tuple[list[str], int, float]
"""A block's `Parts` by the names of its three modules: what a model shares with its twins."""
_found: WeakKeyDictionary[object, dict[int, _Named | str]] = WeakKeyDictionary()


@evaluated
def find_parts(decoder: Decoder, blocks: Sequence[int] | None = None) -> tuple[Parts, ...]:
    """Return the parts of some blocks, all by default.

    Raises:
        ValueError: a block that does not exist, or one whose attention, MLP and heads cannot be
            told apart; the message says what it holds and which blocks have parts.
    """
    wanted = check_blocks(decoder, blocks)
    if (checked := checked_as(decoder)) not in _found:
        _found[checked] = _look(decoder)
    found = _found[checked]
    result = []
    for index in wanted:
        if isinstance(own := found[index], str):
            have = [str(block) for block, other in found.items() if not isinstance(other, str)]
            raise ValueError(
                f"Block {index} of {decoder.name} has no attention with heads beside an MLP: "
                f"{own} Blocks that have: {', '.join(have) or 'none'}."
            )
        names, n_heads, multiplier = own
        attention, mlp, projection = map(decoder.blocks[index].get_submodule, names)
        result.append(Parts(attention, mlp, projection, n_heads, multiplier))
    return tuple(result)


def slice_of(parts: Parts, width: int, heads: Sequence[int] | None) -> Tensor:
    """Return where in the projection's input, `width` wide, the outputs of some heads lie."""
    places = torch.arange(width).view(parts.n_heads, -1)
    return places.flatten() if heads is None else places[list(heads)].flatten()


_alone: Known[int, list[Inputs]] = WeakKeyDictionary()
"""Inputs of lone tokens, by their number: where a block has parts, no weight decides them."""


class SeenError(Exception):
    """The heads' outputs were seen; the rest of the block is not needed."""


class TokensAlone:
    """Runs a block on tokens each by itself, the heads' outputs put in: no other token matters."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.inputs = known_of(_alone, decoder)

    def __call__(
        self,
        block: int,
        parts: Parts,
        entering: Tensor,
        heads: Tensor,
        mlp: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the states after the block, and what the module `parts.attention` put out.

        Both of the shape of `entering` `[…, d_model]`. The MLP's output is its own without `mlp`.
        """
        rows = [None if part is None else part.flatten(0, -2) for part in (entering, heads, mlp)]
        results = []
        for chosen in torch.arange(len(rows[0])).split(ROWS_AT_ONCE):  # type: ignore[arg-type]
            given = [None if part is None else part[chosen][:, None] for part in rows]
            results.append(self._run(block, parts, *given))  # type: ignore[arg-type]
        states, written = (
            torch.cat(found).view(entering.shape) for found in zip(*results, strict=True)
        )
        return states, written

    def _run(
        self, block: int, parts: Parts, entering: Tensor, heads: Tensor, mlp: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the states after the block and what the attention put out `[n, d_model]`."""
        written: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            written.append(untuple(output).clone())

        def put_heads(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (heads.to(args[0]).reshape(args[0].shape), *args[1:])

        def put_mlp(_module: nn.Module, _args: Any, output: Any) -> Any:
            if mlp is None:
                return None
            old = untuple(output)
            new = mlp.to(old).reshape(old.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        if len(entering) not in self.inputs:
            self.inputs[len(entering)] = _inputs_of_lone_tokens(self.decoder, len(entering))
        inputs = self.inputs[len(entering)][block]
        with (
            parts.projection.register_forward_pre_hook(put_heads),
            parts.attention.register_forward_hook(keep),
            parts.mlp.register_forward_hook(put_mlp),
            torch.inference_mode(),
        ):
            hidden = entering.to(inputs["device"])
            module = self.decoder.blocks[block]
            states = untuple(module(hidden, **inputs["others"]))
        first, second = (
            part.float().cpu().view(len(entering), -1) for part in (states, written[0])
        )
        return first, second


def _inputs_of_lone_tokens(decoder: Decoder, n: int) -> list[Inputs]:
    """Return what each block receives for `n` prompts of one token, beside its device."""
    tokens = torch.ones(n, 1, dtype=torch.long, device=decoder.device)
    calls: list[Inputs] = [{} for _ in decoder.blocks]

    def note(block: int, call: Inputs) -> None:
        calls[block] = {"others": call["others"], "device": call["hidden"].device}

    with watching(decoder, range(decoder.n_blocks), note):
        run_blocks(decoder, tokens, set())
    return calls


def whole_mask(call: Inputs, block: int) -> Tensor:
    """Return the mask `[·, 1, queries, keys]` that a block received, made if it received none."""
    length, mask = call["hidden"].shape[1], call["others"].get("attention_mask")
    if mask is None:  # transformers leaves out a mask that hides nothing but the future
        held = [value for value in call["others"].values() if isinstance(value, FrozenCache)]
        layers: Any = held[0].layers if held else []
        before = layers[block].keys.shape[-2] if held else 0
        seen = torch.ones(length, before + length, dtype=torch.bool, device=call["hidden"].device)
        mask = seen.tril(before)[None, None]
    return mask


def hidden_value(mask: Tensor) -> float | bool:
    """Return what a mask holds where a token is hidden."""
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else False


def _look(decoder: Decoder) -> dict[int, _Named | str]:
    """Return each block's parts, or why there are none."""
    n_tokens = min(N_TOKENS, decoder.d_vocab)
    tokens = torch.arange(n_tokens, device=decoder.device)[None]
    calls: dict[int, Inputs] = {}
    ran: dict[int, list[tuple[nn.Module, Tensor, Tensor]]] = {}

    def note(block: int, call: Inputs) -> None:
        calls[block] = call

    def see(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out = untuple(output)
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                ran[block].append((module, args[0], out.clone()))  # some are added to in place

        return hook

    with ExitStack() as stack:
        for index, block in enumerate(decoder.blocks):
            ran[index] = []
            for module in block.modules():
                if module is not block:
                    stack.enter_context(module.register_forward_hook(see(index)))
        stack.enter_context(watching(decoder, range(decoder.n_blocks), note))
        run_blocks(decoder, tokens, set())
    alone = TokensAlone(decoder)
    found: dict[int, _Named | str] = {}
    for index, call in calls.items():
        try:
            parts = _find(decoder, index, call, ran[index], alone)
            named = {module: name for name, module in decoder.blocks[index].named_modules()}
            names = [named[part] for part in (parts.attention, parts.mlp, parts.projection)]
            found[index] = (names, parts.n_heads, parts.multiplier)
        except _NotPartsError as reason:
            kinds = dict.fromkeys(
                type(child).__name__ for child in decoder.blocks[index].children()
            )
            found[index] = (
                f"{reason}; {type(decoder.blocks[index]).__name__} holds {', '.join(kinds)}."
            )
    return found


class _NotPartsError(Exception):
    """The modules of a block do not behave as attention, heads and MLP."""


def _find(
    decoder: Decoder,
    index: int,
    call: Inputs,
    ran: Sequence[tuple[nn.Module, Tensor, Tensor]],
    alone: TokensAlone,
) -> Parts:
    """Return the parts of a block from what its modules received and put out, and test them."""
    n_heads = getattr(decoder.text_config, "num_attention_heads", None)
    if not isinstance(n_heads, int):
        raise _NotPartsError("its configuration names no number of attention heads")
    before, multiplier, after = _summands(call, ran)
    attention, mlp = ran[before][0], ran[after][0]
    linear = [entry for entry in ran[: before + 1] if _is_linear(entry[0])]
    if not linear or linear[-1][1].shape[-1] % n_heads:
        raise _NotPartsError(
            f"no output projection of {n_heads} heads was found before the addition"
        )
    projection, heads, _ = linear[-1]
    parts = Parts(attention, mlp, projection, n_heads, multiplier)
    heads = heads.reshape(*call["output"].shape[:2], -1)
    try:
        again, _ = alone(index, parts, call["hidden"], heads)
    except REFUSALS as error:
        raise _NotPartsError("it cannot be run on one token alone") from error
    if not agree(call["output"].float().cpu()[:, 1:], again[:, 1:]):  # without the sink
        raise _NotPartsError("other tokens reach its output by another way than the heads")
    try:
        changed = _heads_changed_by_masks(decoder.blocks[index], call, parts)
    except REFUSALS as error:
        raise _NotPartsError("it takes no mask that hides tokens head by head") from error
    if not torch.equal(changed, torch.eye(n_heads, dtype=torch.bool)):
        raise _NotPartsError("a mask for one head does not change that head's output alone")
    return parts


def _summands(
    call: Inputs, ran: Sequence[tuple[nn.Module, Tensor, Tensor]]
) -> tuple[int, float, int]:
    """Return which two modules' outputs, times a common factor, add up to the block's step."""
    step = (call["output"].float() - call["hidden"].float())[:, 1:]  # without the attention sink
    called = [module for module, _, _ in ran]
    outputs = {
        order: out.float().reshape(call["output"].shape)[:, 1:]
        for order, (module, _, out) in enumerate(ran)
        if out.numel() == call["output"].numel() and called.count(module) == 1
    }
    exact = call["output"].dtype in (torch.float32, torch.float64)
    room = (1e-4 if exact else 5e-2) * step.abs().max() + (1e-6 if exact else 1e-2) * call[
        "output"
    ][:, 1:].float().abs().max()
    for first, one in outputs.items():
        for second, other in outputs.items():
            total = one + other.to(one.device)
            factor = (step.to(total.device) * total).sum() / total.square().sum()
            missed = (step.to(total.device) - factor * total).abs().max()
            if second > first and bool(missed <= room):
                return first, float(factor), second
    raise _NotPartsError("no two of its modules' outputs add up to what it adds")


def _is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear map, whatever its class (quantised, transposed)."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and not any(True for _ in module.children())
    )


def _heads_changed_by_masks(block: nn.Module, call: Inputs, parts: Parts) -> Tensor:
    """Return which heads' outputs `[n_heads, n_heads]` change if one alone is made to look away.

    It sees its own token alone, and then the first one alone: what looks there anyway changes by
    the other.
    """
    seen: list[Tensor] = []

    def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(*call["hidden"].shape[:2], parts.n_heads, -1)[0, -1].clone())
        raise SeenError

    whole = whole_mask(call, 0).expand(-1, parts.n_heads, -1, -1)
    masks = [whole]
    for hidden in (slice(None, -1), slice(1, None)):
        for head in range(parts.n_heads):
            masks.append(whole.clone())
            masks[-1][:, head, -1, hidden] = hidden_value(whole)
    with parts.projection.register_forward_pre_hook(see), torch.inference_mode():
        for mask in masks:
            with suppress(SeenError):
                block.forward(call["hidden"], **{**call["others"], "attention_mask": mask})
    change = (torch.stack(seen[1:]) - seen[0]).abs().amax(-1)
    return (change > 1e-6 * seen[0].abs().max()).view(2, parts.n_heads, -1).any(dim=0).cpu()
