"""Sites inside a block: exchanges of what its attention, its MLP and its heads put out.

To exchange one of them at a token is to exchange the residual stream after the block at that token,
for the state that the block would have put out. `sweep_sites` computes that state, from a run of
the block on the token alone (`lib.engine.parts`), and hands it to `sweep_blocks`: so an exchange
inside a block is as exact and as fast as one after it. Heads of several blocks at once are
exchanged by `patch_heads`: the last token runs once more for each group of heads, all groups side
by side, each from the first of its blocks on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lib.engine.batches import Batch, equal_length_rows, plant_prompts, stack_prompts
from lib.engine.edits import exchange
from lib.engine.extraction import Prompts, check_blocks, check_finite, check_prompts
from lib.engine.models import Decoder, evaluated
from lib.engine.parts import (
    Parts,
    SeenError,
    TokensAlone,
    find_parts,
    hidden_value,
    slice_of,
    whole_mask,
)
from lib.engine.passes import (
    REFUSALS,
    Inputs,
    Known,
    Sizes,
    agree,
    as_call,
    forests_are_exact,
    holds,
    inputs_of,
    lengthened,
    run_blocks,
    watching,
)
from lib.engine.replay import (
    MAX_ROW_TOKENS,
    Forest,
    Prefix,
    ReplayUnsupportedError,
    plant_rest,
    replay_rows,
    run_forest,
)
from lib.engine.structure import untuple
from lib.engine.sweeps import (
    BATCH_TOKENS,
    UNEMBEDDING_ROWS,
    Measure,
    Sweep,
    check_numbers,
    check_pairs,
    name_pair,
    position_table,
    sweep_blocks,
)

Head = tuple[int, int]
"""A block and the number of one of its heads."""
_prefixed: Known[Sizes, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Site:
    """A place inside a block whose output can be exchanged.

    Attributes:
        part: the attention or the MLP, each counted as what it adds to the residual stream.
        heads: some of the attention's heads, counted from 0; all by default.
    """

    part: Literal["attention", "mlp"]
    heads: tuple[int, ...] | None = None


ATTENTION, MLP = Site("attention"), Site("mlp")


def each_head(decoder: Decoder, blocks: Sequence[int] | None = None) -> dict[str, Site]:
    """Return a site for each head, named by its number."""
    n_heads = min(parts.n_heads for parts in find_parts(decoder, blocks))
    return {str(head): Site("attention", (head,)) for head in range(n_heads)}


@evaluated
def sweep_sites(
    decoder: Decoder,
    prompts: Prompts,
    pairs: np.ndarray,
    sites: Mapping[str, Site],
    *,
    blocks: Sequence[int] | None = None,
    read_ids: Sequence[int] = (),
    measure: Measure | None = None,
    forests: list[Forest] | None = None,
    description: str | None = None,
) -> Sweep:
    """Return the effect of exchanging each site's output for the donor's, in each block.

    The output is replaced at the last token; the rest of that block and all later blocks follow
    from it. The result's `edits` are the sites, its `blocks` those in which they were exchanged.

    Args:
        decoder: the model.
        prompts: token ids; lengths may differ.
        pairs: `[n_pairs, 2]`: index of the recipient among `prompts`, and of the donor.
        sites: named sites, all of which share a pass.
        blocks: the blocks, all by default.
        read_ids: tokens whose logits to return.
        measure: as in `sweep_blocks`; it sees the indices of `pairs`.
        forests: as in `sweep_blocks`.
        description: what a progress display calls this sweep; None shows none.

    Raises:
        ValueError: a site, head, block, pair or token to read that does not exist, a prompt of one
            token, or a model without such parts; the message says which. And as `sweep_blocks` of a
            measure or a model that returns no finite numbers.
    """
    wanted = check_blocks(decoder, blocks)
    prompts = check_prompts(decoder, prompts)
    position_table(prompts, "last")  # refuses a prompt of one token, an attention sink
    parts = find_parts(decoder, wanted)
    read_ids = decoder.check_tokens(read_ids)
    _check_sites(decoder, sites, parts)
    pairs = check_pairs(pairs, len(prompts), len(prompts))
    forests = [] if forests is None else forests
    outputs = _read_outputs(decoder, prompts, np.unique(pairs), wanted, parts, forests)
    donors = torch.empty(len(wanted), len(sites), len(pairs), decoder.d_model)
    tokens_alone = TokensAlone(decoder)
    for part in ("attention", "mlp"):
        numbered = {n: site for n, site in enumerate(sites.values()) if site.part == part}
        for index, block in enumerate(wanted if numbered else ()):
            given = outputs[index].exchange(list(numbered.values()), pairs, parts[index])
            donors[index, list(numbered)], _ = tokens_alone(block, parts[index], *given)
    n_pairs = len(pairs)
    copies = np.stack([np.tile(pairs[:, 0], len(sites)), np.arange(len(sites) * n_pairs)], axis=1)
    sweep = sweep_blocks(
        decoder,
        prompts,
        copies,
        {"exchange": exchange},
        positions="last",
        donors=donors.flatten(1, 2),
        blocks=wanted,
        read_ids=read_ids,
        measure=measure and _of_pairs(measure, n_pairs),
        forests=forests,
        description=description,
    )

    def apart(values: np.ndarray) -> np.ndarray:
        """Return `[1, n_blocks, n_sites · n_pairs, …]` as `[n_sites, n_blocks, n_pairs, …]`."""
        split = values[0].reshape(len(wanted), len(sites), n_pairs, *values.shape[3:])
        return split.swapaxes(0, 1)

    measures = {name: apart(values) for name, values in sweep.measures.items()}
    clean = sweep.clean_logits[:n_pairs]
    return Sweep(tuple(sites), wanted, pairs, apart(sweep.logits), clean, measures, sweep.path)


def _of_pairs(measure: Measure, n_pairs: int) -> Measure:
    return lambda logits, copy: measure(logits, copy % n_pairs)


@evaluated
def patch_heads(
    decoder: Decoder,
    prompts: Prompts,
    pairs: np.ndarray,
    groups: Mapping[str, Sequence[Head]],
    *,
    hidden: Mapping[str, Sequence[Sequence[int]]] | None = None,
    measure: Measure,
    forests: list[Forest] | None = None,
) -> dict[str, np.ndarray]:
    """Return the effect of exchanging chosen heads of any blocks together, at the last token.

    Every head of a group puts out what it puts out on the donor's unedited prompt, while all else
    follows from the edits of the blocks before it.

    With `hidden` the heads instead put out what they would if the last token could not attend to
    those tokens: attention knock-out (Geva et al., arXiv:2304.14767), head by head. Each pair then
    names one prompt twice.

    Args:
        decoder: the model.
        prompts: token ids; lengths may differ.
        pairs: `[n_pairs, 2]`: index of the recipient among `prompts`, and of the donor.
        groups: named groups of heads, each a block and a head's number; an empty one edits nothing.
        hidden: by group, for each prompt the positions that are hidden from its heads.
        measure: as in `sweep_blocks`.
        forests: as in `sweep_blocks`.

    Returns:
        What `measure` returned, by name `[n_groups, n_pairs]`.

    Raises:
        ValueError: no groups; a head, pair or position that does not exist, a model without such
            parts, a group without hidden positions, tokens that cannot be hidden, or a measure or a
            model that does not return finite numbers; the message says which.
    """
    prompts = check_prompts(decoder, prompts)
    position_table(prompts, "last")  # refuses a prompt of one token, an attention sink
    pairs = check_pairs(pairs, len(prompts), len(prompts))
    if not groups:
        raise ValueError("No groups of heads were given; name at least one.")
    hide: list[list[list[int]]] | None = None
    if hidden is not None:
        if missing := [name for name in groups if name not in hidden]:
            raise ValueError(f"Group {missing[0]!r} has no hidden positions; give each group its.")
        hide = [_check_hidden(prompts, pairs, hidden[name]) for name in groups]
    forests = [] if forests is None else forests
    named = [(name, head) for name, group in groups.items() for head in group]
    parts, found = _read_heads(decoder, prompts, named, np.unique(pairs), forests)
    outputs = {block: own.heads for block, own in found.items()}
    chosen = [_heads_by_block(group, parts, outputs) for group in groups.values()]
    firsts = np.array([min(heads, default=decoder.n_blocks) for heads in chosen])
    results: dict[str, np.ndarray] = {}

    def row_name(group: int, pair: int) -> str:
        return f"group {list(groups)[group]!r}, {name_pair(pair, pairs)}"

    for run, own in _recipients(decoder, prompts, pairs, len(groups), forests):
        for some in _in_passes(firsts, isinstance(run, Prefix)):
            which: dict[int, Tensor] = {}
            for block in sorted({block for number in some for block in chosen[number]}):
                none = torch.zeros(outputs[block].shape[-1], dtype=torch.bool)
                begun = [number for number in some if firsts[number] <= block]
                which[block] = torch.stack([chosen[number].get(block, none) for number in begun])
            if hide is None:
                new = {block: outputs[block][pairs[own, 1], None] for block in which}
                edit = _put_heads(parts, which, new)
            else:
                table = [
                    [[key - len(prompts[row]) for key in hide[number][row]] for number in some]
                    for row in pairs[own, 0]
                ]
                edit = _hide_from_heads(decoder, parts, which, table)
            with edit, torch.inference_mode():
                last = _run_last(decoder, run, firsts[some].tolist()).flatten(0, 1)
                logits = decoder.unembed(decoder.final_norm(last)).float()
                pair = np.repeat(own, len(some))
                at = (np.tile(some, len(own)), pair)
                check_finite(
                    last, lambda row, _, at=at: f"Last state of {row_name(*(a[row] for a in at))}"
                )
                read = measure(logits, torch.as_tensor(pair, device=logits.device))
            check_numbers(read, results, at, row_name)
            for name, values in read.items():
                if name not in results:
                    results[name] = np.full((len(groups), len(pairs)), np.nan)
                results[name][at] = values.cpu().double().numpy()
    return results


@evaluated
def head_outputs(
    decoder: Decoder,
    prompts: Prompts,
    heads: Sequence[Head],
    *,
    rows: np.ndarray | None = None,
    forests: list[Forest] | None = None,
) -> Tensor:
    """Return what each head adds to the residual stream at the last token.

    What the attention adds, less what it would add if the head put out nothing: with a plain output
    projection the head's slice through it, with a norm behind it (Gemma) what that norm makes of
    the difference.

    Args:
        decoder: the model.
        prompts: token ids; lengths may differ.
        heads: each a block and a head's number.
        rows: which of the prompts, all by default.
        forests: as in `sweep_blocks`.

    Returns:
        `[n_heads, n_rows, d_model]`, float32, on the CPU.

    Raises:
        ValueError: no heads, a head that does not exist, or a model without such parts.
    """
    if not heads:
        raise ValueError("No heads were given; name at least one, a block and a head's number.")
    prompts = check_prompts(decoder, prompts)
    position_table(prompts, "last")  # refuses a prompt of one token, an attention sink
    members = np.arange(len(prompts)) if rows is None else np.asarray(rows)
    forests = [] if forests is None else forests
    named = [(f"{block}.{head}", (block, head)) for block, head in heads]
    parts, outputs = _read_heads(decoder, prompts, named, np.unique(members), forests)
    alone = TokensAlone(decoder)
    written = []
    for block, head in heads:
        part = parts[block]
        entering, whole = outputs[block].entering[members], outputs[block].heads[members]
        without = whole.clone()
        without[..., slice_of(part, without.shape[-1], [head])] = 0
        whole, rest = (alone(block, part, entering, given)[1] for given in (whole, without))
        written.append(part.multiplier * (whole - rest))
    return torch.stack(written)


def _heads_by_block(
    group: Sequence[Head], parts: Mapping[int, Parts], outputs: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Return which numbers of the projection's input a group's heads hold `[width]`, by block."""
    found: dict[int, Tensor] = {}
    for block in sorted({block for block, _ in group}):
        width = outputs[block].shape[-1]
        found[block] = torch.zeros(width, dtype=torch.bool)
        found[block][slice_of(parts[block], width, [h for b, h in group if b == block])] = True
    return found


def _recipients(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    pairs: np.ndarray,
    n_groups: int,
    forests: list[Forest],
) -> Iterator[tuple[Prefix | Tensor, np.ndarray]]:
    """Yield the recipients of some pairs, ready to run, and these pairs.

    The last token alone, after a forest of the others, where that is exact; else whole prompts of
    one length `[n, length]`.
    """
    unique, members = np.unique(pairs[:, 0]), np.unique(pairs)
    lengths = np.array([len(prompt) for prompt in prompts])
    batches: Iterable[tuple[np.ndarray, Forest | None]]
    if _last_tokens_are_exact(decoder, prompts, members):
        planted = plant_rest(decoder, prompts, members, forests, BATCH_TOKENS)
        run = (planted.run(decoder, number) for number in range(len(planted.batches)))
        batches = ((forest.batch.rows, forest) for forest in run)
    else:
        alike = equal_length_rows([prompts[r] for r in unique], BATCH_TOKENS)
        batches = ((unique[rows], None) for rows in alike)
    for rows, forest in batches:
        own = np.flatnonzero(np.isin(pairs[:, 0], rows))
        if not len(own):
            continue
        most = BATCH_TOKENS // int(lengths[pairs[own, 0]].max())
        most = max(1, min(most, UNEMBEDDING_ROWS // min(n_groups, MAX_ROW_TOKENS)))
        for some in np.array_split(own, -(-len(own) // most)):
            recipients = pairs[some, 0]
            if forest is None:
                tokens = [list(prompts[row]) for row in recipients]
                yield torch.tensor(tokens, device=decoder.device), some
            else:
                yield _last_token(forest, recipients, lengths[recipients]), some


def _in_passes(firsts: np.ndarray, by_rows: bool) -> Iterator[np.ndarray]:
    """Yield which groups run in one pass, those first whose first edited block is.

    As rows of one token, side by side; whole prompts run once for each group.
    """
    order = np.argsort(firsts, kind="stable")
    at_once = MAX_ROW_TOKENS if by_rows else 1
    for start in range(0, len(order), at_once):
        yield order[start : start + at_once]


def _last_token(forest: Forest, rows: np.ndarray, lengths: np.ndarray) -> Prefix:
    """Return some prompts, ready for edits of their last tokens."""
    return forest.prefix(rows, lengths, lengths - 1)


def _last_tokens_are_exact(
    decoder: Decoder, prompts: Sequence[Sequence[int]], members: np.ndarray
) -> bool:
    """Say whether some prompts may run as forests, and their last tokens after these alone.

    Compared, once for a model and again for longer prompts, with all tokens: the last one is run
    twice side by side, through all blocks and from a middle one on.
    """
    own = [prompts[member] for member in members]
    longest = max(own, key=len)

    def compare(length: int) -> bool:
        one = lengthened(decoder, longest, length)
        whole = _run_last(decoder, torch.tensor([one], device=decoder.device))
        try:
            forest = run_forest(decoder, plant_prompts([one], [0], BATCH_TOKENS)[0])
            prefix = _last_token(forest, np.array([0]), np.array([length]))
            rows = _run_last(decoder, prefix, [0, 1 + decoder.n_blocks // 2])
        except (ReplayUnsupportedError, *REFUSALS):
            return False
        return agree(whole, rows)

    return forests_are_exact(decoder, own) and holds(decoder, _prefixed, compare, len(longest))


def _run_last(decoder: Decoder, run: Prefix | Tensor, firsts: Sequence[int] = (0,)) -> Tensor:
    """Return the last token's residual stream after the last block `[n, n_firsts, d_model]`.

    Of whole prompts `[n, length]`, or of the last token after a prefix, run once for each of
    `firsts`, ascending: from that block on, its inputs being those of the clean run.
    """
    if isinstance(run, Prefix):
        embedded = _embed_last(decoder, run) if firsts[0] == 0 else None
        entering = [embedded if first == 0 else run.states[first - 1] for first in firsts]
        rows = torch.stack(entering, dim=1)  # type: ignore[arg-type]
        return replay_rows(decoder, run, [first - 1 for first in firsts], rows)
    block = decoder.n_blocks - 1
    return run_blocks(decoder, run, {block})[block][:, -1:]


def _embed_last(decoder: Decoder, prefix: Prefix) -> Tensor:
    """Return what enters the first block for the last token `[n_prompts, 1, d_model]`."""
    entering: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(as_call(module, args, kwargs)["hidden"])
        raise SeenError

    mask = prefix.block_inputs[0]["attention_mask"]
    place = (mask[:, 0] == 0).sum(-1) - 1  # the last token sees all others of its prompt
    told = {"past_key_values": prefix.cache, "attention_mask": mask, "position_ids": place}
    stopped = decoder.blocks[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    with suppress(SeenError), stopped, torch.inference_mode():
        decoder.model.base_model(prefix.tokens[:, -1:], use_cache=True, **told)
    return entering[0].to(decoder.device)


@contextmanager
def _put_heads(
    parts: Mapping[int, Parts], chosen: Mapping[int, Tensor], new: Mapping[int, Tensor]
) -> Iterator[None]:
    """Put `new` in the place of the last tokens' heads, where `chosen` says.

    By block `[n, n_rows or 1, width]` and `[n_rows, width]`, of the rows that have entered.
    """

    def put(block: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            heads = args[0].reshape(len(new[block]), -1, args[0].shape[-1]).clone()
            which = chosen[block].to(heads.device)
            rows = heads[:, -len(which) :]
            rows.copy_(torch.where(which, new[block].to(heads), rows))
            return (heads.view(args[0].shape), *args[1:])

        return hook

    with ExitStack() as stack:
        for block in chosen:
            hook = parts[block].projection.register_forward_pre_hook(put(block))
            stack.callback(hook.remove)
        yield


@contextmanager
def _hide_from_heads(
    decoder: Decoder,
    parts: Mapping[int, Parts],
    chosen: Mapping[int, Tensor],
    hidden: Sequence[Sequence[Sequence[int]]],
) -> Iterator[None]:
    """Put in the place of the last tokens' heads what they put out with tokens hidden.

    Of each prompt and row those of its tokens, counted from its end.
    """
    blind: dict[int, Tensor] = {}

    def look(block: int) -> Callable[..., None]:
        def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
            heads = args[0].reshape(len(hidden), -1, args[0].shape[-1])
            blind[block] = heads[:, -len(chosen[block]) :].clone()
            raise SeenError

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = as_call(module, args, kwargs)
            inputs = _hide(call, block, hidden, len(chosen[block]))
            stopped = parts[block].projection.register_forward_pre_hook(see, prepend=True)
            with suppress(SeenError), stopped:
                module.forward(call["hidden"], **inputs)

        return hook

    with ExitStack() as stack:
        for block in chosen:
            entered = decoder.blocks[block].register_forward_pre_hook
            stack.enter_context(entered(look(block), with_kwargs=True))
        stack.enter_context(_put_heads(parts, chosen, blind))
        yield


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What one block received and put out at the last tokens, by prompt `[n_prompts, …]`.

    `entering` is the residual stream before the block, `heads` the projection's input, `mlp` the
    MLP's output.
    """

    entering: Tensor
    heads: Tensor
    mlp: Tensor

    def exchange(
        self, sites: Sequence[Site], pairs: np.ndarray, parts: Parts
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what enters the block, the heads and the MLP's output in each pair's edit.

        Of sites of the attention, or of the MLP `[n_sites, n_pairs, …]`.
        """
        recipient, donor = torch.as_tensor(pairs).T
        entering, heads = (
            own[recipient].repeat(len(sites), 1, 1) for own in (self.entering, self.heads)
        )
        if sites[0].part == "mlp":
            return entering, heads, self.mlp[donor].repeat(len(sites), 1, 1)
        for number, site in enumerate(sites):
            chosen = slice_of(parts, heads.shape[-1], site.heads)
            heads[number][:, chosen] = self.heads[donor][:, chosen]
        return entering, heads, None


def _read_heads(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    named: Sequence[tuple[str, Head]],
    members: np.ndarray,
    forests: list[Forest],
) -> tuple[dict[int, Parts], dict[int, _Outputs]]:
    """Return the parts and the outputs, by block, of the blocks of heads, these checked by name."""
    wanted = tuple(sorted({block for _, (block, _) in named}))
    parts = dict(zip(wanted, find_parts(decoder, wanted), strict=True))
    for name, (block, head) in named:
        _check_sites(decoder, {name: Site("attention", (head,))}, [parts[block]])
    found = _read_outputs(decoder, prompts, members, wanted, tuple(parts.values()), forests)
    return parts, dict(zip(wanted, found, strict=True))


def _read_outputs(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    members: np.ndarray,
    wanted: tuple[int, ...],
    parts: tuple[Parts, ...],
    forests: list[Forest],
) -> list[_Outputs]:
    """Return the outputs of the blocks' sites for some prompts; those of others may be zero.

    Of what is in the forests, the last tokens alone are run; the rest is added to them.
    """
    seen: dict[tuple[str, int], Tensor] = {}  # of the batch that runs
    kept: dict[tuple[str, int], Tensor] = {}

    # Asked before hooks are put on the blocks, which would answer no.
    exact = _last_tokens_are_exact(decoder, prompts, members)
    lengths = np.array([len(prompt) for prompt in prompts])

    def run() -> Iterator[Batch]:
        if exact:
            planted = plant_rest(decoder, prompts, members, forests, BATCH_TOKENS)
            n_there = len(planted.forests)
            for number in range(len(planted.batches)):
                forest = planted.run(decoder, number)
                own = forest.batch.rows
                if number >= n_there:
                    yield forest.batch
                else:
                    prefix = _last_token(forest, own, lengths[own])
                    _run_last(decoder, prefix, [min(wanted, default=decoder.n_blocks)])
                    first = torch.zeros(len(own), 1, dtype=torch.long)
                    yield Batch(own, prefix.tokens[:, -1:], torch.arange(len(own)), first)
            return
        for chosen in equal_length_rows([prompts[member] for member in members], BATCH_TOKENS):
            batch = stack_prompts(prompts, members[chosen].tolist())
            with torch.inference_mode():
                decoder.model.base_model(use_cache=False, **inputs_of(decoder, batch))
            yield batch

    def see_heads(block: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen["heads", block] = args[0]

        return hook

    def see_mlp(block: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["mlp", block] = untuple(output).clone()  # parallel blocks add to it in place

        return hook

    def note(block: int, call: Inputs) -> None:
        seen["entering", block] = call["hidden"]

    with ExitStack() as stack:
        for block, part in zip(wanted, parts, strict=True):
            stack.callback(part.projection.register_forward_pre_hook(see_heads(block)).remove)
            stack.callback(part.mlp.register_forward_hook(see_mlp(block)).remove)
        stack.enter_context(watching(decoder, wanted, note))
        for batch in run():
            for name, states in seen.items():
                lines = states.reshape(*batch.tokens.shape, -1)
                picked = lines[batch.lines, batch.columns[:, -1]].cpu()  # where prompts end
                if name not in kept:
                    kept[name] = picked.new_zeros(len(prompts), picked.shape[-1])
                kept[name][torch.as_tensor(batch.rows)] = picked
            seen.clear()
    names = ("entering", "heads", "mlp")
    return [_Outputs(*(kept[name, block] for name in names)) for block in wanted]


def _hide(
    call: Inputs, block: int, hidden: Sequence[Sequence[Sequence[int]]], n_rows: int
) -> Inputs:
    """Return a block's inputs under a mask that hides tokens from rows, which come last."""
    mask = whole_mask(call, block).expand(len(hidden), -1, -1, -1).clone()
    queries_before, keys_before = (size - n_rows for size in mask.shape[-2:])
    for prompt, by_row in enumerate(hidden):
        for row, keys in enumerate(by_row[:n_rows]):
            for key in keys:
                at = keys_before + 1 + key  # counted from a prompt's end, its row
                if at >= 0:  # a sliding window has left the others behind
                    mask[prompt, :, queries_before + row, at] = hidden_value(mask)
    return {**call["others"], "attention_mask": mask}


def _check_sites(decoder: Decoder, sites: Mapping[str, Site], parts: Sequence[Parts]) -> None:
    if not sites or not parts:
        raise ValueError("No sites were given, or no blocks; name at least one, such as ATTENTION.")
    n_heads = min(part.n_heads for part in parts)
    for name, site in sites.items():
        if site.part not in ("attention", "mlp"):
            raise ValueError(f"Site {name!r}: part {site.part!r} is neither 'attention' nor 'mlp'.")
        if site.part == "mlp" and site.heads is not None:
            raise ValueError(f"Site {name!r}: an MLP has no heads.")
        for head in site.heads or ():
            if not 0 <= head < n_heads:
                raise ValueError(
                    f"Site {name!r}: head {head} does not exist; {decoder.name} has heads 0 to "
                    f"{n_heads - 1}."
                )


def _check_hidden(
    prompts: Sequence[Sequence[int]], pairs: np.ndarray, hidden: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return the hidden positions of each prompt, checked."""
    if len(hidden) != len(prompts):
        raise ValueError(f"Hidden positions for {len(hidden)} prompts of {len(prompts)}.")
    if (pairs[:, 0] != pairs[:, 1]).any():
        raise ValueError("Tokens are hidden within a prompt: each pair must name one prompt twice.")
    table = [[int(place) for place in row] for row in hidden]
    for index, row in enumerate(table):
        last = len(prompts[index]) - 1
        for place in row:
            if not 0 <= place < last:
                raise ValueError(
                    f"Prompt {index}: position {place} cannot be hidden from position {last}; "
                    f"choose among 0 to {last - 1}."
                )
    return table
