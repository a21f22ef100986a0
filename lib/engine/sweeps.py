"""Sweeps: an edit at every block for every pair of recipient and donor, exactly and fast."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.engine.batches import Batch, plant_prompts
from lib.engine.edits import Edit, apply_edit
from lib.engine.extraction import (
    Prompts,
    check_blocks,
    check_finite,
    check_positions,
    check_prompts,
    iterate_states,
    logit_lens,
)
from lib.engine.models import Decoder, evaluated
from lib.engine.passes import (
    REFUSALS,
    Known,
    Sizes,
    agree,
    forests_are_exact,
    has_hooks,
    holds,
    lengthened,
)
from lib.engine.progress import track
from lib.engine.replay import (
    MAX_ROW_TOKENS,
    Forest,
    Planted,
    Prefix,
    ReplayUnsupportedError,
    fits,
    plant_rest,
    recompute_rows,
    replay_rows,
    run_forest,
    run_prefix,
    run_whole,
)

Measure = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
BATCH_TOKENS = 2048
UNEMBEDDING_ROWS = 512
PREFIX_SHARE = 4
"""How many times the tokens of its rows a group's prefixes may hold."""
_planted: Known[Sizes, bool] = WeakKeyDictionary()
_by_themselves: Known[Sizes, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Sweep:
    """What the edits did to the recipients' next-token logits.

    Attributes:
        edits: names of the edits.
        blocks: blocks after which they were made.
        pairs: recipient and donor of each pair `[n_pairs, 2]`.
        logits: logits of the tokens read `[n_edits, n_blocks, n_pairs, n_read]`, float32.
        clean_logits: the recipients' unedited logits of those tokens `[n_pairs, n_read]`.
        measures: what `measure` returned, by name `[n_edits, n_blocks, n_pairs]`.
        path: how it was computed, `"prefix replay"` or `"full recompute"`.
    """

    edits: tuple[str, ...]
    blocks: tuple[int, ...]
    pairs: np.ndarray
    logits: np.ndarray
    clean_logits: np.ndarray
    measures: Mapping[str, np.ndarray]
    path: str

    def to_frame(self) -> pd.DataFrame:
        """Return one row per edit, block and pair; `choice` indexes the largest logit read."""
        shape = (len(self.edits), len(self.blocks), len(self.pairs))
        edit, block, pair = (axis.ravel() for axis in np.indices(shape))
        frame = pd.DataFrame(
            {
                "edit": np.array(self.edits)[edit],
                "block": np.array(self.blocks)[block],
                "recipient": self.pairs[pair, 0],
                "donor": self.pairs[pair, 1],
            }
        )
        if self.logits.shape[-1]:
            frame["choice"] = self.logits.argmax(-1).ravel()
        for name, values in self.measures.items():
            frame[name] = values.ravel()
        return frame


@evaluated
def sweep_blocks(
    decoder: Decoder,
    prompts: Prompts,
    pairs: np.ndarray,
    edits: Mapping[str, Edit],
    *,
    positions: np.ndarray | Sequence[int] | str,
    donors: Tensor | np.ndarray | None = None,
    blocks: Sequence[int] | None = None,
    read_ids: Sequence[int] = (),
    measure: Measure | None = None,
    batch_tokens: int = BATCH_TOKENS,
    forests: list[Forest] | None = None,
    description: str | None = None,
) -> Sweep:
    """Return the effect of each edit, after each block, on every recipient of `pairs`.

    The edited residual stream is `edit(recipient's state, donor's state)` at the given position (or
    positions); later tokens and later blocks follow from it. Prefix replay does the work and is
    checked on the first recipient against a full recompute; where an architecture does not allow
    it, the full recompute is used throughout, and the result's `path` says so.

    Args:
        decoder: the model.
        prompts: token ids; lengths may differ.
        pairs: `[n_pairs, 2]`: index of the recipient among `prompts`, and of the donor.
        edits: named edits, all of which share the prefix and one pass.
        positions: `"last"`, one position per prompt `[n_prompts]`, or several `[n_prompts, k]`.
        donors: donor states `[n_blocks, n_donors, d_model]` (or `[n_blocks, n_donors, k, d_model]`)
            in the order of `blocks`; by default the prompts' own states at their positions.
        blocks: the blocks to edit after, all by default.
        read_ids: tokens whose logits to return.
        measure: a function of the full logits `[n_rows, d_vocab]` and the rows' pair indices
            `[n_rows]` that returns named numbers `[n_rows]`; it sees a bounded chunk at a time.
            Without one, only the rows of the unembedding in `read_ids` are multiplied.
        batch_tokens: most row tokens in one pass; with `d_model` it bounds the working set.
        forests: what this model has run, which is not run again; the rest of the prompts is added
            as long as all fit in `KEPT_BYTES`. Another model's are refused.
        description: what a progress display calls this sweep; None shows none.

    Raises:
        ValueError: no edits or blocks; pairs, positions, blocks, donors or tokens to read that do
            not fit; an edit or a measure that refuses, or does not return finite numbers in the
            shape asked for, or a model that does not (named with block and pair).
    """
    wanted = check_blocks(decoder, blocks)
    if not wanted or not edits:
        raise ValueError("No edits were given, or no blocks; name at least one of each.")
    asked = Request(prompts, pairs, positions, donors, read_ids)
    prompts, pairs, where, donors, read_ids = _check_request(decoder, asked, len(wanted))
    from_end = where - np.array([len(prompt) for prompt in prompts])[:, None]
    shape = (len(edits), len(wanted), len(pairs), len(read_ids))

    def row_name(edit: int, block: int, pair: int) -> str:
        where = f"edit {list(edits)[edit]!r} after block {wanted[block]}"
        return f"{where}, {name_pair(pair, pairs)}"

    logits = np.empty(shape, dtype=np.float32)
    clean = np.empty((len(pairs), len(read_ids)), dtype=np.float32)
    measures: dict[str, np.ndarray] = {}
    n_rows = len(edits) * len(wanted) * int(np.bincount(pairs[:, 0]).max())
    run = np.unique(pairs if donors is None else pairs[:, 0])
    kept = [] if forests is None else forests
    planted = plant_rest(decoder, prompts, run, kept, batch_tokens)
    stands = _stands(decoder, prompts, where, pairs[:, 0], planted.batches, n_rows, batch_tokens)
    if donors is None:
        donors = _own_states(decoder, prompts, where, wanted, pairs, stands, planted)
        check_finite(donors, lambda at, row, *_: f"State of prompt {row} after block {wanted[at]}")
    prefixes = _prefixes(decoder, prompts, where, stands, planted)
    total = sum(len(stand.groups) for stand in stands)
    for group, shared, prefix in track(prefixes, description, total) if description else prefixes:
        if len(read_ids):
            own = logit_lens(decoder, prefix.states[-1][:, -1], read_ids)
            named = group.recipients
            check_finite(own, lambda row, _, named=named: f"Unedited logits of prompt {named[row]}")
            clean[group.pair_table] = own.numpy()[:, None]
        for rows in _row_chunks(len(edits), wanted, group.pair_table.shape[1], prefix):
            edited = _edit(prefix, from_end, group, donors, pairs, edits, wanted, rows)
            compute = replay_rows if shared else recompute_rows
            last = compute(decoder, prefix, [wanted[block] for block in rows.block], edited)
            _read(decoder, last, group, rows, read_ids, measure, logits, measures, row_name)
    check_finite(torch.from_numpy(logits), lambda *at: f"Logits of {row_name(*at[:3])}")
    path = "prefix replay" if all(stand.exact for stand in stands) else "full recompute"
    return Sweep(tuple(edits), wanted, pairs, logits, clean, measures, path)


@dataclass(frozen=True, eq=False)
class Request:
    """One sweep of several that run together: arguments of `sweep_blocks` that differ."""

    prompts: Prompts
    pairs: np.ndarray
    positions: np.ndarray | Sequence[int] | str
    donors: Tensor | np.ndarray | None = None
    read_ids: Sequence[int] = ()
    measure: Measure | None = None


def sweep_together(
    decoder: Decoder,
    requests: Sequence[Request],
    edits: Mapping[str, Edit],
    *,
    blocks: Sequence[int] | None = None,
    forests: list[Forest] | None = None,
    description: str | None = None,
) -> list[Sweep]:
    """Return the sweep of each request; prompts of one length share passes across requests.

    Weights are read from memory once a pass, whatever is in it: few prompts of many tasks take half
    the time that they take task by task. Requests with as many positions a prompt run as one sweep.

    Args:
        decoder: the model.
        requests: what differs; all give donors or none does, all measure by the same names or none
            measures.
        edits: as `sweep_blocks`, the same for all.
        blocks: as `sweep_blocks`, the same for all.
        forests: as `sweep_blocks`.
        description: as `sweep_blocks`.

    Raises:
        ValueError: as `sweep_blocks`; some requests give donors, or measure, and others do not, or
            their measures return other names.
    """
    for what, given in (
        ("donors", [one.donors is not None for one in requests]),
        ("a measure", [one.measure is not None for one in requests]),
    ):
        if any(given) and not all(given):
            raise ValueError(
                f"Request {given.index(False)} has no {what.removeprefix('a ')}, and request "
                f"{given.index(True)} has; give {what} to all that run together, or to none."
            )
    n_blocks = len(check_blocks(decoder, blocks))
    requests = [Request(*_check_request(decoder, one, n_blocks), one.measure) for one in requests]
    tables = [np.asarray(one.positions) for one in requests]
    names: dict[str, None] = {}
    result: dict[int, Sweep] = {}
    for width in sorted({table.shape[1] for table in tables}):
        numbers = [n for n, table in enumerate(tables) if table.shape[1] == width]
        chosen = [requests[number] for number in numbers]
        offset = np.cumsum([0, *(len(one.pairs) for one in chosen)])
        read_ids = sorted({int(token) for one in chosen for token in one.read_ids})
        whole = sweep_blocks(
            decoder,
            [prompt for one in chosen for prompt in one.prompts],
            _renumber(chosen),
            edits,
            positions=np.concatenate([tables[number] for number in numbers]),
            donors=_side_by_side([one.donors for one in chosen]),
            blocks=blocks,
            read_ids=read_ids,
            measure=_each_its_own([one.measure for one in chosen], offset, names),
            forests=forests,
            description=description,
        )
        for place, (number, one) in enumerate(zip(numbers, chosen, strict=True)):
            own = slice(offset[place], offset[place + 1])
            columns = np.searchsorted(read_ids, np.asarray(one.read_ids, dtype=np.int64))
            result[number] = Sweep(
                whole.edits,
                whole.blocks,
                np.asarray(one.pairs),
                whole.logits[:, :, own][..., columns],
                whole.clean_logits[own][:, columns],
                {name: values[:, :, own] for name, values in whole.measures.items()},
                whole.path,
            )
    return [result[number] for number in range(len(requests))]


def _renumber(requests: Sequence[Request]) -> np.ndarray:
    """Return the pairs of all requests `[n_pairs, 2]`, numbered through prompts and donors."""
    pairs, n_prompts, n_donors = [], 0, 0
    for one in requests:
        first = (n_prompts, n_prompts if one.donors is None else n_donors)
        pairs.append(one.pairs + np.array(first))
        n_prompts += len(one.prompts)
        n_donors += 0 if one.donors is None else one.donors.shape[1]
    return np.concatenate(pairs)


def _side_by_side(donors: Sequence[Tensor | np.ndarray | None]) -> Tensor | None:
    given = [torch.as_tensor(one) for one in donors if one is not None]
    return torch.cat(given, dim=1) if given else None


def _each_its_own(
    measures: Sequence[Measure | None], offset: np.ndarray, names: dict[str, None]
) -> Measure | None:
    """Return the measure that gives each request's rows to its own; requests follow `offset`.

    `names` are those that were measured before, if any were; they are added to it.
    """
    if measures[0] is None:
        return None
    bounds = torch.as_tensor(offset[1:])

    def measure(logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        owner = torch.bucketize(pair, bounds.to(pair.device), right=True)
        result: dict[str, Tensor] = {}
        for number in owner.unique().tolist():
            held = torch.nonzero(owner == number)[:, 0]
            first, end = int(held[0]), int(held[-1]) + 1
            # Neighbours are a view: full logits are not copied.
            rows = slice(first, end) if end - first == len(held) else held
            own = measures[number]
            assert own is not None
            given = own(logits[rows], pair[rows] - int(offset[number]))
            _check_form(given, names, len(held))
            names.update(dict.fromkeys(given))
            for name, values in given.items():
                if name not in result:
                    result[name] = torch.full((len(pair),), torch.nan, dtype=torch.float64)
                result[name][rows] = values.cpu().double()
        return result

    return measure


@dataclass(frozen=True)
class _Group:
    """Recipients `[n]` whose prompts line up; their pairs `[n, n_columns]`, padded by repeats."""

    recipients: np.ndarray
    pair_table: np.ndarray


@dataclass(frozen=True)
class _Stand:
    """Groups of recipients on one forest, or by themselves, and whether replay is exact there."""

    batch: Batch | None
    groups: Sequence[_Group]
    exact: bool


@dataclass(frozen=True)
class _Rows:
    """Rows of one pass, in the order in which they enter: indices of edit, block, pair column."""

    edit: np.ndarray
    block: np.ndarray
    column: np.ndarray


def _stands(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    where: np.ndarray,
    recipients: np.ndarray,
    batches: Sequence[Batch],
    n_rows: int,
    batch_tokens: int,
) -> list[_Stand]:
    """Return the recipients of all pairs in groups, and how each group may be run exactly.

    On forests, batches of prompts that share what they begin with; else each group by itself.
    """
    edited = np.unique(recipients)
    layouts = {_layout(prompts, where, recipient): int(recipient) for recipient in edited}
    longest_first = sorted(layouts, reverse=True)  # one comparison does for the shorter ones

    def exact(layout: tuple[int, int], planted: bool) -> bool:
        return _replay_is_exact(decoder, prompts[layouts[layout]], layout[1], planted)

    def groups(members: np.ndarray, *, ragged: bool) -> list[_Group]:
        return _groups(prompts, where, recipients, members, n_rows, batch_tokens, ragged=ragged)

    run = [prompts[row] for batch in batches for row in batch.rows]
    if forests_are_exact(decoder, run) and all(
        exact(layout, planted=True) for layout in longest_first
    ):
        return [
            _Stand(batch, groups(np.intersect1d(edited, batch.rows), ragged=True), True)
            for batch in batches
        ]
    known = {layout: exact(layout, planted=False) for layout in longest_first}
    return [
        _Stand(None, [group], known[_layout(prompts, where, group.recipients[0])])
        for group in groups(edited, ragged=False)
    ]


def _layout(prompts: Sequence[Sequence[int]], where: np.ndarray, recipient: int) -> tuple[int, int]:
    """Return the length of a prompt, and of a row of it: from the first edited token to the end."""
    length = len(prompts[recipient])
    return length, length - int(where[recipient].min())


def _groups(
    prompts: Sequence[Sequence[int]],
    where: np.ndarray,
    recipients: np.ndarray,
    members: np.ndarray,
    n_rows: int,
    batch_tokens: int,
    *,
    ragged: bool,
) -> list[_Group]:
    """Return groups of `members` of `n_rows` rows at most, as many as `batch_tokens` allows.

    Their rows are alike; where groups are not `ragged`, the tokens before them too.
    """
    lengths = np.array([len(prompts[member]) for member in members])
    from_end = (lengths[:, None] - where[members]).tolist()
    alike = [tuple(row) if ragged else (n, *row) for n, row in zip(lengths, from_end, strict=True)]
    found = []
    for key in sorted(set(alike), reverse=True):
        own = np.flatnonzero([one == key for one in alike])
        own = own[np.argsort(-lengths[own], kind="stable")]
        row_length = max(from_end[own[0]])
        most = max(row_length, min(n_rows * row_length, MAX_ROW_TOKENS))
        most = max(most, int(lengths[own[0]]) // PREFIX_SHARE)
        for chosen in np.array_split(members[own], -(-len(own) // max(1, batch_tokens // most))):
            columns = [np.flatnonzero(recipients == member) for member in chosen]
            n_columns = max(map(len, columns))
            found.append(_Group(chosen, np.stack([np.resize(c, n_columns) for c in columns])))
    return found


def _row_chunks(
    n_edits: int, wanted: tuple[int, ...], n_columns: int, prefix: Prefix
) -> Iterator[_Rows]:
    """Yield a group's rows, early blocks first, in chunks of at most `MAX_ROW_TOKENS` tokens."""
    place, edit, column = (axis.ravel() for axis in np.indices((len(wanted), n_edits, n_columns)))
    block = np.argsort(wanted, kind="stable")[place]
    most = max(1, MAX_ROW_TOKENS // prefix.row_length)
    for part in np.array_split(np.arange(len(block)), -(-len(block) // most)):
        yield _Rows(edit[part], block[part], column[part])


def _edit(
    prefix: Prefix,
    from_end: np.ndarray,
    group: _Group,
    donors: Tensor,
    pairs: np.ndarray,
    edits: Mapping[str, Edit],
    wanted: tuple[int, ...],
    rows: _Rows,
) -> Tensor:
    """Return the edited rows `[n_recipients, n_rows, row_length, d_model]`."""
    n_recipients = len(group.recipients)
    offsets = torch.as_tensor(from_end[group.recipients], device=prefix.states.device)
    members = torch.arange(n_recipients, device=prefix.states.device)
    clean = prefix.states[[wanted[block] for block in rows.block]].transpose(0, 1)
    edited = clean.clone()
    named = list(edits.values())
    for edit, block in dict.fromkeys(zip(rows.edit.tolist(), rows.block.tolist(), strict=True)):
        chosen = np.flatnonzero((rows.edit == edit) & (rows.block == block))
        given = pairs[group.pair_table[:, rows.column[chosen]], 1]
        donor = donors[block, torch.as_tensor(given)].to(clean)
        state = prefix.states[wanted[block]][members[:, None], offsets][:, None].expand_as(donor)
        pair = group.pair_table[:, rows.column[chosen]].repeat(donor.shape[2])

        def pair_name(item: int, pair: np.ndarray = pair) -> str:
            return name_pair(int(pair[item]), pairs)

        who = f"Edit {list(edits)[edit]!r} after block {wanted[block]}"
        changed = apply_edit(named[edit], state, donor, who, pair_name)
        index = torch.as_tensor(chosen, device=clean.device)
        edited[members[:, None, None], index[None, :, None], offsets[:, None, :]] = changed
    return edited


def name_pair(pair: int, pairs: np.ndarray) -> str:
    """Return what a message calls a pair."""
    return f"pair {pair} (recipient {pairs[pair, 0]}, donor {pairs[pair, 1]})"


def _read(
    decoder: Decoder,
    last: Tensor,
    group: _Group,
    rows: _Rows,
    read_ids: Sequence[int],
    measure: Measure | None,
    logits: np.ndarray,
    measures: dict[str, np.ndarray],
    row_name: Callable[[int, int, int], str],
) -> None:
    """Write the logits and measures of one pass's last states `[n_recipients, n_rows, d_model]`."""
    pair = group.pair_table[:, rows.column]
    edit, block = (np.broadcast_to(axis, pair.shape).ravel() for axis in (rows.edit, rows.block))
    pair = pair.ravel()
    flat = last.reshape(-1, last.shape[-1])

    def last_state(row: int, _: int) -> str:
        return f"Last state of {row_name(*(int(axis[row]) for axis in (edit, block, pair)))}"

    check_finite(flat, last_state)
    if measure is None:
        if len(read_ids):
            logits[edit, block, pair] = logit_lens(decoder, flat, read_ids).numpy()
        return
    for part in torch.arange(len(flat)).split(UNEMBEDDING_ROWS):
        chosen = part.numpy()  # a tensor of one element would index an array as a number does
        at = (edit[chosen], block[chosen], pair[chosen])
        with torch.inference_mode():
            full = decoder.unembed(decoder.final_norm(flat[part.to(flat.device)])).float()
            if len(read_ids):
                logits[at] = full[:, torch.as_tensor(read_ids, device=full.device)].cpu().numpy()
            measured = measure(full, torch.as_tensor(pair[chosen], device=full.device))
        check_numbers(measured, measures, at, row_name)
        for name, values in measured.items():
            if name not in measures:
                measures[name] = np.full(logits.shape[:3], np.nan)
            measures[name][at] = values.cpu().double().numpy()


def check_numbers(
    measured: Mapping[str, Any],
    known: Mapping[str, Any],
    at: tuple[np.ndarray, ...],
    row_name: Callable[..., str],
) -> None:
    """Check what a measure gave: the names of those known, and finite numbers, one a row."""
    _check_form(measured, known, len(at[0]))
    for name, values in measured.items():
        if not bool((finite := torch.isfinite(values)).all()):
            row = int(finite.int().argmin())
            where = row_name(*(int(axis[row]) for axis in at))
            raise ValueError(
                f"Measure {name!r} is {float(values[row])} for {where}; a measure returns finite "
                "numbers."
            )


def _check_form(measured: Mapping[str, Any], known: Mapping[str, Any], n_rows: int) -> None:
    if known and measured.keys() != known.keys():
        raise ValueError(
            f"Measures that run together return one set of names; got {sorted(measured)}, and "
            f"before {sorted(known)}."
        )
    for name, values in measured.items():
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != (n_rows,):
            raise ValueError(
                f"Measure {name!r} is {shape}; expected a tensor ({n_rows},), one number a row."
            )


def _prefixes(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    where: np.ndarray,
    stands: Sequence[_Stand],
    planted: Planted,
) -> Iterator[tuple[_Group, bool, Prefix]]:
    """Yield each group, whether replay is exact, and what its rows start from."""
    for number, stand in enumerate(stands):
        on_forest = stand.batch is not None and stand.groups
        forest = planted.run(decoder, number) if on_forest else None
        for group in stand.groups:
            prefix = _run(decoder, prompts, where, group.recipients, stand.exact, forest)
            yield group, stand.exact, prefix


def _run(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    where: np.ndarray,
    recipients: np.ndarray,
    shared: bool,
    forest: Forest | None,
) -> Prefix:
    if forest is not None:
        firsts = where[recipients].min(axis=1)
        return forest.prefix(recipients, np.array([len(prompts[r]) for r in recipients]), firsts)
    tokens = torch.tensor([list(prompts[r]) for r in recipients], device=decoder.device)
    return (run_prefix if shared else run_whole)(decoder, tokens, int(where[recipients].min()))


def _replay_is_exact(
    decoder: Decoder, prompt: Sequence[int], row_tokens: int, planted: bool
) -> bool:
    """Compare, once for a model and again for longer prompts and rows, replay with full recompute.

    After the first block and the middle one a prompt is given its own state with the coordinates in
    reverse: as long, in another direction. It is `planted` on a forest, or by itself. Under a
    user's hooks, which may count tokens, replay is never taken for exact.
    """
    if has_hooks(decoder):
        return False
    block = list(dict.fromkeys((0, decoder.n_blocks // 2)))

    def compare(length: int, row_tokens: int) -> bool:
        one, first = lengthened(decoder, prompt, length), length - row_tokens
        try:
            forest = None
            if planted:
                forest = run_forest(decoder, plant_prompts([one], [0], BATCH_TOKENS)[0])
            prefix = _run(decoder, [one], np.array([[first]]), np.array([0]), True, forest)
            rows = prefix.states[block].transpose(0, 1).clone()
            rows[:, :, 0] = rows[:, :, 0].flip(-1)
            fast = replay_rows(decoder, prefix, block, rows)
        except (ReplayUnsupportedError, *REFUSALS):
            return False  # the block refuses rows side by side: the slower path is always right
        return agree(recompute_rows(decoder, prefix, block, rows), fast)

    return holds(decoder, _planted if planted else _by_themselves, compare, len(prompt), row_tokens)


def _own_states(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    where: np.ndarray,
    wanted: tuple[int, ...],
    pairs: np.ndarray,
    stands: Sequence[_Stand],
    planted: Planted,
) -> Tensor:
    """Return the states of the prompts that serve as donors `[n_blocks, n_prompts, k, d_model]`.

    The states of prompts that do not serve as donors may be zero.
    """
    states = torch.zeros(len(wanted), len(prompts), where.shape[1], decoder.d_model)
    donors = np.unique(pairs[:, 1])
    for number, stand in enumerate(stands):
        if stand.batch is not None:
            given = np.intersect1d(donors, stand.batch.rows)
            forest = planted.run(decoder, number)
            states[:, given] = forest.states_at(given, where[given], wanted)
            if fits(forest, planted.forests.values()):
                planted.forests[number] = forest  # for its own edits, whoever else keeps none
    if stands[0].batch is None:
        places = torch.as_tensor(where[donors].T)
        alone = [prompts[donor] for donor in donors]
        for rows, picked in iterate_states(decoder, alone, places, set(wanted)):
            for index, block in enumerate(wanted):
                states[index, donors[rows]] = picked[block].transpose(0, 1).float().cpu()
    return states


def position_table(prompts: Prompts, positions: np.ndarray | Sequence[int] | str) -> np.ndarray:
    """Return positions `[n_prompts, k]`, ascending, none of them 0."""
    if isinstance(positions, str):
        table = np.array(check_positions(prompts, "last"))[:, None]
    else:
        given = np.atleast_1d(np.asarray(positions))
        columns = given[:, None] if given.ndim == 1 else given
        table = np.stack([check_positions(prompts, column) for column in columns.T], axis=1)
    if (table == 0).any():
        prompt = int(np.flatnonzero((table == 0).any(axis=1))[0])
        raise ValueError(
            f"Prompt {prompt} would be edited at position 0, an attention sink that is never "
            "analysed; choose a later position."
        )
    return table


def _check_request(
    decoder: Decoder, asked: Request, n_blocks: int
) -> tuple[list[list[int]], np.ndarray, np.ndarray, Tensor | None, list[int]]:
    """Return prompts, pairs, positions, donors and tokens to read of a request, checked."""
    prompts = check_prompts(decoder, asked.prompts)
    where = position_table(prompts, asked.positions)
    donors, n_donors = asked.donors, len(prompts)
    if donors is not None:
        donors = _check_donors(donors, (n_blocks, where.shape[1], decoder.d_model))
        n_donors = donors.shape[1]
    pairs = check_pairs(asked.pairs, len(prompts), n_donors)
    return prompts, pairs, where, donors, decoder.check_tokens(asked.read_ids)


def _check_donors(donors: Tensor | np.ndarray, expected: tuple[int, int, int]) -> Tensor:
    # Torch takes no array that is read backwards.
    given = torch.from_numpy(donors.copy()) if isinstance(donors, np.ndarray) else donors
    if given.dim() == 3:
        given = given[:, :, None]
    if (given.shape[0], *given.shape[2:]) != expected:
        raise ValueError(
            f"Donor states have shape {tuple(given.shape)}; expected [{expected[0]} blocks, "
            f"donors, {expected[1]} positions, {expected[2]}]."
        )
    return given


def check_pairs(pairs: np.ndarray, n_prompts: int, n_donors: int) -> np.ndarray:
    """Return pairs `[n_pairs, 2]`; ValueError for those that name no prompt or donor."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise ValueError(f"Pairs must have shape [n_pairs, 2] with n_pairs ≥ 1, got {pairs.shape}.")
    if not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"Pairs are indices of prompts, whole numbers; got {pairs.dtype}.")
    if pairs.min() < 0 or pairs[:, 0].max() >= n_prompts or pairs[:, 1].max() >= n_donors:
        raise ValueError(
            f"Pairs name recipients up to {pairs[:, 0].max()} and donors up to "
            f"{pairs[:, 1].max()}, but there are {n_prompts} prompts and {n_donors} donors."
        )
    return np.ascontiguousarray(pairs, dtype=np.int64)  # torch takes no array read backwards
