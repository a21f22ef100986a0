"""Batches: which prompts run in one pass, one to a line or several side by side on a line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LINE_TOKENS = 64
FILLER = 0  # a token that no prompt sees


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts that run in one pass.

    Attributes:
        rows: the prompts' indices `[n]`.
        tokens: `[n_lines, length]`.
        lines: the line on which each prompt lies `[n]`.
        starts: where on its line each prompt begins `[n]`.
        places: each token's place in its own prompt `[n_lines, length]`, which begins anew with
            every prompt; None where every line is one prompt.
    """

    rows: np.ndarray
    tokens: Tensor
    lines: Tensor
    starts: Tensor
    places: Tensor | None = None


def equal_length_rows(prompts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield lists of prompt indices of one length each, at most `batch_tokens` tokens a list."""
    lengths = np.array([len(prompt) for prompt in prompts])
    for length in np.unique(lengths)[::-1]:  # the longest first: what is exact there is so below
        rows = np.flatnonzero(lengths == length)
        size = max(1, batch_tokens // int(length))
        for start in range(0, len(rows), size):
            yield rows[start : start + size].tolist()


def stack_prompts(prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Batch:
    """Return a batch of prompts of one length, one to a line."""
    tokens = torch.tensor([list(prompts[row]) for row in rows])
    return Batch(np.array(rows), tokens, torch.arange(len(rows)), torch.zeros(len(rows), dtype=int))  # type: ignore[call-overload]


def pack_prompts(
    prompts: Sequence[Sequence[int]], rows: Sequence[int], batch_tokens: int
) -> list[Batch]:
    """Return batches of prompts of any length, several side by side on a line where they fit.

    A line holds `LINE_TOKENS` tokens, or the longest prompt: what a token's attention spends on the
    prompts beside its own stays small. Lines are filled by best fit, longest prompts first.
    """
    longest = max(len(prompts[row]) for row in rows)
    room = max(longest, min(LINE_TOKENS, batch_tokens))
    lines = _best_fit({row: len(prompts[row]) for row in rows}, room)
    n_batches = -(-len(lines) // max(1, batch_tokens // room))
    return [
        _lay_out(prompts, [lines[index] for index in part])
        for part in np.array_split(np.arange(len(lines)), n_batches)
    ]


def _best_fit(lengths: dict[int, int], room: int) -> list[list[int]]:
    """Put each prompt, longest first, on the line with the least room that still holds it."""
    lines: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        length = lengths[row]
        left = next((left for left in range(length, room) if with_room[left]), room)
        if left == room:
            lines.append([])
            with_room[room].append(len(lines) - 1)
        line = with_room[left].pop()
        lines[line].append(row)
        with_room[left - length].append(line)
    return lines


def _lay_out(prompts: Sequence[Sequence[int]], lines: list[list[int]]) -> Batch:
    """Return the batch of some lines, each the indices of its prompts; the rest is filled up."""
    length = max(sum(len(prompts[row]) for row in line) for line in lines)
    tokens = torch.full((len(lines), length), FILLER)
    places = torch.zeros(len(lines), length, dtype=torch.long)
    rows, at, starts = [], [], []
    for index, line in enumerate(lines):
        start = 0
        for row in line:
            end = start + len(prompts[row])
            tokens[index, start:end] = torch.tensor(list(prompts[row]))
            places[index, start:end] = torch.arange(end - start)
            rows.append(row)
            at.append(index)
            starts.append(start)
            start = end
    return Batch(np.array(rows), tokens, torch.tensor(at), torch.tensor(starts), places)
