"""Prefix replay: many edited states of one prompt, each run on to the last token, in one pass.

An edit at position `first` cannot change anything before it, and an edit after block ℓ cannot
change blocks 0 … ℓ. So the tokens before `first` run once per prompt and leave their keys and
values; an edited *row* (the tokens from `first` to the end) enters after its own block and runs
through the later blocks only. All rows of a prompt lie side by side on the sequence axis: each sees
the shared prefix and itself, never another row, so the prefix is neither recomputed nor copied.

Cost, in multiply–accumulates: with P prefix tokens, S tokens a row, L blocks and m per token and
block, a sweep of R rows over all blocks needs about P·L·m once per prompt and R·S·m for every later
block, L/2 on average; a full recompute needs R·(P + S)·m for all L blocks. Rows also attend to the
other rows' masked places: `MAX_ROW_TOKENS` bounds that at a few percent of m.

The later blocks are called with the keyword arguments (masks, rotary angles, …) that they received
in a reference pass, tiled over the rows, so nothing here is tied to one architecture.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lib.engine.batches import Batch, plant_prompts
from lib.engine.models import Decoder, weight_versions
from lib.engine.passes import (
    REFUSALS,
    Inputs,
    Known,
    Sizes,
    agree,
    holds,
    inputs_of,
    lengthened,
    run_batch,
    run_blocks,
    watching,
)
from lib.engine.structure import untuple

MAX_ROW_TOKENS = 64
KEPT_BYTES = 5 * 2**27
"""Most memory for forests that are run once and serve more than once."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Prompts of one length, run once, ready for edits from position `first` on.

    Attributes:
        tokens: `[n_prompts, length]`.
        first: the first position that may be edited.
        states: clean residual streams `[n_blocks, n_prompts, length − first, d_model]`.
        cache: keys and values of the tokens before `first`; None where they cannot be shared.
        block_inputs: the keyword arguments each block received for the tokens from `first` on.
    """

    tokens: Tensor
    first: int
    states: Tensor
    cache: "FrozenCache | None" = None
    block_inputs: tuple[dict[str, Any], ...] = ()

    @property
    def row_length(self) -> int:
        """Tokens from `first` to the end."""
        return self.tokens.shape[1] - self.first


class FrozenCache(DynamicCache):
    """Keys and values of a prefix, handed to every row and changed by none."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return prefix and row states joined along the sequence axis; store nothing."""
        layer: Any = self.layers[layer_idx]
        keys = torch.cat([layer.keys, key_states], dim=-2)
        return keys, torch.cat([layer.values, value_states], dim=-2)


@dataclass(frozen=True, eq=False)
class Forest:
    """A batch of prompts on lines, run once, and what every token of it left.

    Attributes:
        batch: the prompts.
        states: clean residual streams by block, each `[n_lines, length, d_model]`.
        cache: keys and values of all tokens.
        block_inputs: the keyword arguments each block received.
        decoder: the model that ran it, as long as there is one.
        weights: `weight_versions` it when it did.
    """

    batch: Batch
    states: tuple[Tensor, ...]
    cache: DynamicCache
    block_inputs: tuple[dict[str, Any], ...]
    decoder: ref[Decoder]
    weights: tuple[tuple[int, int, bytes], ...]

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        """The batch's prompts, in its order."""
        batch, found = self.batch, []
        for line, columns in zip(batch.lines.tolist(), batch.columns, strict=True):
            found.append(tuple(batch.tokens[line, columns.unique()].tolist()))
        return found

    def renumbered(self, rows: Sequence[tuple[Sequence[int], int]]) -> "Forest":
        """Return the forest with other rows for its members: rows of each one, and the member."""
        members = torch.tensor([member for own, member in rows for _ in own])
        batch = replace(
            self.batch,
            rows=np.array([row for own, _ in rows for row in own]),
            lines=self.batch.lines[members],
            columns=self.batch.columns[members],
        )
        return replace(self, batch=batch)

    @property
    def n_bytes(self) -> int:
        """Memory that its states, keys and values take."""
        layers: Any = self.cache.layers
        held = [*self.states, *(part for layer in layers for part in (layer.keys, layer.values))]
        return sum(tensor.nbytes for tensor in held)

    def states_at(self, rows: np.ndarray, places: np.ndarray, blocks: Sequence[int]) -> Tensor:
        """Return prompts' states `[n_blocks, n, k, d_model]` at places `[n, k]`, float32, CPU."""
        members = self.batch.members(rows)
        lines = self.batch.lines[members][:, None]
        columns = self.batch.columns[members].gather(1, torch.as_tensor(places))
        return torch.stack([self.states[block][lines, columns].float().cpu() for block in blocks])

    def states_of(self, blocks: set[int], places: Tensor) -> dict[int, Tensor]:
        """Return `{block: states [k, n, d_model]}` of its prompts at `places` `[k, n_prompts]`."""
        columns = self.batch.columns.gather(1, places[:, self.batch.rows].T).T
        return {block: self.states[block][self.batch.lines, columns] for block in blocks}

    def prefix(self, rows: np.ndarray, lengths: np.ndarray, firsts: np.ndarray) -> Prefix:
        """Return some prompts, each ready for edits from its own position on.

        Tokens line up at the prompts' ends; before the beginning of a shorter one there are tokens
        that its rows do not see.

        Args:
            rows: the prompts' indices `[n]`.
            lengths: of the prompts `[n]`.
            firsts: the first position that may be edited `[n]`, as far from each one's end.
        """
        members = self.batch.members(rows)
        longest, first = int(lengths.max()), int(firsts.max())
        places = torch.arange(longest) - torch.as_tensor(longest - lengths)[:, None]
        lines = self.batch.lines[members][:, None]
        columns = self.batch.columns[members].gather(1, places.clamp(min=0))
        cache = FrozenCache()
        layers: Any = self.cache.layers
        for layer in layers:
            taken = copy(layer)
            taken.keys, taken.values = (
                part.transpose(1, 2)[lines, columns[:, :first]].transpose(1, 2)
                for part in (layer.keys, layer.values)
            )
            cache.layers.append(taken)
        states = torch.stack([own[lines, columns[:, first:]] for own in self.states])
        hidden = (places[:, None] > places[:, first:, None]) | (places[:, None] < 0)
        mask = torch.zeros(hidden.shape, dtype=states.dtype)
        mask = mask.masked_fill(hidden, torch.finfo(states.dtype).min)[:, None].to(states.device)
        told: dict[int, Any] = {}

        def told_of(value: Any) -> Any:
            if id(value) not in told:
                told[id(value)] = self._of_tokens(value, lines, columns[:, first:])
            return told[id(value)]

        inputs = tuple(
            {**{name: told_of(value) for name, value in given.items()}, "attention_mask": mask}
            for given in self.block_inputs
        )
        tokens = self.batch.tokens[lines, columns].to(states.device)
        return Prefix(tokens, first, states, cache, inputs)

    def _of_tokens(self, value: Any, lines: Tensor, columns: Tensor) -> Any:
        """Return what a block was told of some tokens, of what it was told of all."""
        if isinstance(value, tuple | list):
            return type(value)(self._of_tokens(part, lines, columns) for part in value)
        tensor = isinstance(value, Tensor) and value.dim() in (2, 3)
        if tensor and value.shape[:2] == self.batch.tokens.shape:
            return value[lines, columns]
        return value


def run_forest(decoder: Decoder, batch: Batch) -> Forest:
    """Return a batch, run once.

    Raises:
        ReplayUnsupportedError: the model does not keep keys and values of every token.
    """
    cache = DynamicCache()  # of whole lines, whatever windows the layers have
    with _watching_blocks(decoder) as (inputs, outputs), torch.inference_mode():
        told = inputs_of(decoder, batch)
        decoder.model.base_model(past_key_values=cache, use_cache=True, **told)
    _check_cache(cache, batch.tokens.shape[1])
    made = (ref(decoder), weight_versions(decoder))
    return Forest(batch, tuple(outputs), cache, tuple(inputs), *made)


@dataclass(frozen=True, eq=False)
class Planted:
    """Batches of prompts, and the forests of those that were run.

    Attributes:
        batches: of the prompts, their rows those of one list of prompts.
        forests: by number of the batch.
        kept: what forests that are run are added to, as long as all in it fit in `KEPT_BYTES`.
    """

    batches: list[Batch]
    forests: dict[int, Forest]
    kept: list[Forest]

    def run(self, decoder: Decoder, number: int) -> Forest:
        """Return the forest of a batch, running it unless it was kept."""
        if number in self.forests:
            return self.forests[number]
        forest = run_forest(decoder, self.batches[number])
        if fits(forest, self.kept):
            self.kept.append(forest)
            self.forests[number] = forest
        return forest


def fits(forest: Forest, others: Iterable[Forest]) -> bool:
    """Say whether a forest may be kept beside others."""
    return sum(one.n_bytes for one in (*others, forest)) <= KEPT_BYTES


def plant_rest(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: np.ndarray,
    kept: list[Forest],
    batch_tokens: int,
) -> Planted:
    """Return batches of some prompts: first those that stand in a forest, then of all others.

    Raises:
        ValueError: a forest that another model ran, or this one before its weights were changed.
    """
    now = weight_versions(decoder) if kept else ()
    for number, forest in enumerate(kept):
        if forest.decoder() is not decoder or forest.weights != now:
            raise ValueError(
                f"Forest {number} was run by another model than {decoder.name}, or before its "
                "weights were changed; begin a list for each model."
            )
    places: dict[tuple[int, ...], list[int]] = {}
    for row in rows.tolist():
        places.setdefault(tuple(prompts[row]), []).append(row)
    there = []
    for forest in kept:
        held = [(places.pop(prompt, []), member) for member, prompt in enumerate(forest.prompts)]
        if any(own for own, _ in held):
            there.append(forest.renumbered(held))
    rest = sorted(row for own in places.values() for row in own)
    batches = [forest.batch for forest in there]
    batches += plant_prompts(prompts, rest, batch_tokens) if rest else []
    return Planted(batches, dict(enumerate(there)), kept)


_read: Known[Sizes, bool] = WeakKeyDictionary()


def forests_hold_states(decoder: Decoder, prompt: Sequence[int]) -> bool:
    """Compare, once for a model and again for longer prompts, a forest's states with a plain pass.

    Keeping keys and values may change what is computed, and some models keep none.
    """

    def compare(length: int) -> bool:
        (batch,) = plant_prompts([lengthened(decoder, prompt, length)], [0], 1)
        first = min(1, length - 1)  # not the sink
        places = torch.arange(first, length)[:, None]
        slow = run_batch(decoder, batch, set(range(decoder.n_blocks)), places)
        try:
            fast = run_forest(decoder, batch).states
        except (ReplayUnsupportedError, *REFUSALS):
            return False
        return all(agree(states[:, 0], fast[block][0, first:]) for block, states in slow.items())

    return holds(decoder, _read, compare, len(prompt))


@contextmanager
def _watching_blocks(decoder: Decoder) -> Iterator[tuple[list[dict[str, Any]], list[Tensor]]]:
    """Keep what each block is told beside the states, and what it puts out."""
    inputs: list[dict[str, Any]] = [{} for _ in decoder.blocks]
    outputs: list[Tensor] = [torch.empty(0) for _ in decoder.blocks]

    def note(index: int, call: Inputs) -> None:
        inputs[index], outputs[index] = call["others"], call["output"].to(decoder.device)

    with watching(decoder, range(decoder.n_blocks), note):
        yield inputs, outputs


def _check_cache(cache: DynamicCache, length: int) -> None:
    """Raise ReplayUnsupportedError unless every layer holds all tokens' keys and values."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if keys is None or keys.shape[-2] != length:
            raise ReplayUnsupportedError("its cache does not hold every token's keys and values")


def run_prefix(decoder: Decoder, tokens: Tensor, first: int) -> Prefix:
    """Return the prefix of `tokens` `[n_prompts, length]`, run once up to position `first` ≥ 1.

    Raises:
        ReplayUnsupportedError: the model keeps no keys and values for each token (state-space).
    """
    base = decoder.model.base_model
    cache = FrozenCache(config=decoder.text_config)
    with torch.inference_mode():
        growing = DynamicCache(config=decoder.text_config)
        base(tokens[:, :first], past_key_values=growing, use_cache=True)
        if not all(getattr(layer, "keys", None) is not None for layer in growing.layers):
            raise ReplayUnsupportedError("its cache holds no keys and values")
        cache.layers = list(growing.layers)
        with _watching_blocks(decoder) as (inputs, outputs):
            base(tokens[:, first:], past_key_values=cache, use_cache=True)
    return Prefix(tokens, first, torch.stack(outputs), cache, tuple(inputs))


class ReplayUnsupportedError(Exception):
    """This architecture cannot be replayed from a prefix; recompute in full instead."""


def replay_rows(
    decoder: Decoder, prefix: Prefix, row_blocks: Sequence[int], rows: Tensor
) -> Tensor:
    """Return the last token's residual stream after the last block, for every edited row.

    Args:
        decoder: the model.
        prefix: from `run_prefix`, of n_prompts prompts.
        row_blocks: the block after which each row was edited, −1 before the first one, ascending,
            the same for all prompts.
        rows: edited residual streams `[n_prompts, n_rows, row_length, d_model]`.

    Returns:
        `[n_prompts, n_rows, d_model]`.
    """
    if list(row_blocks) != sorted(row_blocks):
        raise ValueError(f"Rows must enter in the order of their blocks; got {list(row_blocks)}.")
    n_prompts, n_rows, length, width = rows.shape
    tiles: dict[int, Tensor] = {}
    hidden = rows[:, :0].reshape(n_prompts, 0, width)
    n_active = 0
    with torch.inference_mode():
        for index in range(min(row_blocks), decoder.n_blocks):
            if n_active:
                inputs = _tile(prefix, index, n_active, n_rows, tiles)
                hidden = untuple(decoder.blocks[index](hidden, **inputs))
            entering = sum(block == index for block in row_blocks)
            if entering:
                new = rows[:, n_active : n_active + entering].reshape(n_prompts, -1, width)
                hidden = torch.cat([hidden, new.to(hidden)], dim=1)
                n_active += entering
    return hidden.view(n_prompts, n_rows, length, width)[:, :, -1].to(rows.device)


def _tile(
    prefix: Prefix, index: int, n_active: int, n_rows: int, tiles: dict[int, Tensor]
) -> dict[str, Any]:
    """Return block `index`'s keyword arguments for `n_active` rows side by side."""
    length = prefix.row_length
    inputs = dict(prefix.block_inputs[index])
    mask = inputs.pop("attention_mask", None)
    if mask is not None and mask.dim() != 4:
        raise ReplayUnsupportedError("its blocks take a mask that is not four-dimensional")
    assert prefix.cache is not None
    n_prefix = prefix.cache.layers[index].keys.shape[-2]  # type: ignore[union-attr]
    tiled = {
        name: _tile_positions(value, length, n_rows, n_active, tiles)
        for name, value in inputs.items()
    }
    for name in ("past_key_values", "past_key_value", "layer_past"):
        if name in tiled:
            tiled[name] = prefix.cache
    if id(mask) not in tiles:  # blocks share one or two masks; the full one serves every depth
        tiles[id(mask)] = _row_mask(mask, n_prefix, length, n_rows, prefix.tokens.device)
    n_tokens = n_active * length
    tiled["attention_mask"] = tiles[id(mask)][..., :n_tokens, : n_prefix + n_tokens]
    return tiled


def _tile_positions(
    value: Any, length: int, n_rows: int, n_active: int, tiles: dict[int, Tensor]
) -> Any:
    """Repeat position-wise tensors (`[n, length, …]` or `[length]`) once per active row.

    What is repeated for all rows is kept in `tiles`: blocks share it and take a part of it.
    """
    if isinstance(value, tuple | list):
        own = (_tile_positions(part, length, n_rows, n_active, tiles) for part in value)
        return type(value)(own)
    if not isinstance(value, Tensor) or value.dim() not in (1, 2, 3):
        return value
    axis = min(1, value.dim() - 1)
    if value.shape[axis] != length:
        return value
    if id(value) not in tiles:
        tiles[id(value)] = torch.cat([value] * n_rows, dim=axis)
    return tiles[id(value)].narrow(axis, 0, n_active * length)


def _row_mask(
    mask: Tensor | None, n_prefix: int, length: int, n_rows: int, device: torch.device
) -> Tensor:
    """Return the mask under which each row sees the prefix and itself: `[·, 1, rows, keys]`."""
    if mask is None:  # transformers leaves out a mask that hides nothing but the future
        seen = torch.ones(length, n_prefix + length, dtype=torch.bool, device=device)
        mask = seen.tril(n_prefix)[None, None]
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
    shape = (*mask.shape[:2], n_rows * length, n_prefix + n_rows * length)
    full = torch.full(shape, hidden, dtype=mask.dtype, device=mask.device)
    full[..., :n_prefix] = mask[..., :n_prefix].repeat(1, 1, n_rows, 1)
    for row in range(n_rows):
        start = row * length
        own = slice(n_prefix + start, n_prefix + start + length)
        full[..., start : start + length, own] = mask[..., n_prefix:]
    return full


def run_whole(decoder: Decoder, tokens: Tensor, first: int) -> Prefix:
    """Return what `run_prefix` returns but for the cache, from one pass over the whole prompts."""
    captured = run_blocks(decoder, tokens, set(range(decoder.n_blocks)))
    states = torch.stack(
        [captured[index][:, first:].to(decoder.device) for index in range(decoder.n_blocks)]
    )
    return Prefix(tokens, first, states)


def recompute_rows(
    decoder: Decoder, prefix: Prefix, row_blocks: Sequence[int], rows: Tensor
) -> Tensor:
    """Return what `replay_rows` returns, by a full forward pass per block: slower, for any decoder.

    The fall-back for models whose cache cannot be shared (state-space and hybrid models, attention
    with per-head position biases), and the reference that every sweep checks itself against.
    """
    results = torch.empty(*rows.shape[:2], rows.shape[-1], dtype=rows.dtype, device=rows.device)
    last: list[Tensor] = []

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        changed = untuple(output).clone()
        changed[:, prefix.first :] = edited.to(changed)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        last.append(untuple(output)[:, -1])

    for row, block in enumerate(row_blocks):
        edited = rows[:, row]
        put = decoder.blocks[block].register_forward_hook(replace)
        with put, decoder.blocks[-1].register_forward_hook(keep), torch.inference_mode():
            decoder.model.base_model(prefix.tokens, use_cache=False)
        results[:, row] = last.pop()
    return results
