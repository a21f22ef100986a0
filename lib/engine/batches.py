"""Batches: which prompts run in one pass, and what of them is run once.

Prompts of one wording begin alike. On a *line* the prompts are paths through a forest of tokens: a
beginning that they share lies there once, and each token sees its own path alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LINE_TOKENS = 128
"""Tokens of a line: attention's cost grows with it, what is shared too. Half as many are left on it
for what follows a beginning, however long that is."""
FILLER = 0  # a token that no prompt sees
Line = Sequence[tuple[int, int]]
"""Prompts of a line, each with the number of tokens that it shares with the one before it."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts that run in one pass.

    Attributes:
        rows: the prompts' indices `[n]`.
        tokens: `[n_lines, length]`.
        lines: the line on which each prompt lies `[n]`.
        columns: where on it each of a prompt's tokens lies `[n, longest]`; its last one from there.
        depths: each token's place in its prompt `[n_lines, length]`; None if a line is one prompt.
        seen: which tokens each one sees `[n_lines, length, length]`; None if all that precede it.
    """

    rows: np.ndarray
    tokens: Tensor
    lines: Tensor
    columns: Tensor
    depths: Tensor | None = None
    seen: Tensor | None = None

    def members(self, rows: np.ndarray) -> np.ndarray:
        """Return at which place of the batch each of some prompts is."""
        order = np.argsort(self.rows)
        return order[np.searchsorted(self.rows[order], rows)]


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
    columns = torch.arange(tokens.shape[1]).expand(len(rows), -1)
    return Batch(np.array(rows), tokens, torch.arange(len(rows)), columns)


def plant_prompts(
    prompts: Sequence[Sequence[int]], rows: Sequence[int], batch_tokens: int
) -> list[Batch]:
    """Return batches of prompts of any length, on lines on which beginnings are shared."""
    longest = max(len(prompts[row]) for row in rows)
    room = max(LINE_TOKENS, longest + LINE_TOKENS // 2)
    lines: list[list[tuple[int, int]]] = []
    before: Sequence[int] = ()
    left = -1
    for row in sorted(rows, key=lambda row: list(prompts[row])):  # those alike are neighbours
        shared = count_alike(before, prompts[row])
        left -= len(prompts[row]) - shared
        if left < 0:
            lines.append([])
            shared, left = 0, room - len(prompts[row])
        lines[-1].append((row, shared))
        before = prompts[row]
    n_batches = -(-len(lines) // max(1, batch_tokens // room))
    parts = np.array_split(np.arange(len(lines)), n_batches)
    return [lay_out(prompts, [lines[index] for index in part]) for part in parts]


def count_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Return with how many tokens both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def lay_out(prompts: Sequence[Sequence[int]], lines: Sequence[Line]) -> Batch:
    """Return the batch of some lines; what no prompt fills sees itself alone."""
    length = max(sum(len(prompts[row]) - shared for row, shared in line) for line in lines)
    longest = max(len(prompts[row]) for line in lines for row, _ in line)
    tokens = torch.full((len(lines), length), FILLER)
    depths = torch.zeros(len(lines), length, dtype=torch.long)
    seen = np.zeros((len(lines), length, length), dtype=bool)
    seen[:, np.arange(length), np.arange(length)] = True
    rows, at, columns = [], [], []
    for index, line in enumerate(lines):
        path, used = np.arange(0), 0
        for row, shared in line:
            new = np.arange(used, used + len(prompts[row]) - shared)
            used += len(new)
            path = np.concatenate([path[:shared], new])
            tokens[index, new] = torch.tensor(prompts[row][shared:], dtype=torch.long)
            depths[index, new] = torch.arange(shared, len(path))
            seen[index, new[:, None], path] = np.tri(len(path), dtype=bool)[shared:]
            rows.append(row)
            at.append(index)
            columns.append(np.pad(path, (0, longest - len(path)), mode="edge"))
    return Batch(
        np.array(rows),
        tokens,
        torch.tensor(at),
        torch.from_numpy(np.stack(columns)),
        depths,
        torch.from_numpy(seen),
    )
