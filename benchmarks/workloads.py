"""Workloads: what every contender is asked to compute, down to the token ids."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lib.engine.edits import Edit, add, exchange, exchange_direction, exchange_norm

EDITS: Mapping[str, Edit] = {
    "exchange": exchange,
    "direction": exchange_direction,
    "norm": exchange_norm,
    "add": add,
}
FIRST_TOKEN = 20  # below it lie special tokens
SEED = 20260204


@dataclass(frozen=True)
class SweepLoad:
    """An edit at one position after every block, for pairs of recipient and donor.

    Attributes:
        name: what the table calls it.
        n_prompts: prompts, of `length` tokens each.
        length: T.
        pairs: recipient and donor of each pair.
        edits: names in `EDITS`.
        position: the token that is edited, counted from the start.
        n_shared_blocks: blocks that the slow contenders are timed on, spread evenly; their time
            for these is scaled to all blocks, since a full pass costs the same for each.
    """

    name: str
    n_prompts: int
    length: int
    pairs: tuple[tuple[int, int], ...]
    position: int
    edits: tuple[str, ...] = ("exchange",)
    n_shared_blocks: int = 5

    def prompts(self, d_vocab: int) -> list[list[int]]:
        """Return token ids `[n_prompts][length]`, the same in every process."""
        return _draw([self.length] * self.n_prompts, d_vocab)

    def shared_blocks(self, n_blocks: int) -> tuple[int, ...]:
        """Return the blocks of the share, in the middle of equal parts of the depth."""
        n = min(self.n_shared_blocks, n_blocks)
        return tuple(int((i + 0.5) * n_blocks / n) for i in range(n))


@dataclass(frozen=True)
class ExtractLoad:
    """The residual stream after every block at the last token of each prompt.

    Attributes:
        name: what the table calls it.
        lengths: tokens of each prompt.
        stride: all contenders are timed on every `stride`-th prompt, and scaled.
    """

    name: str
    lengths: tuple[int, ...]
    stride: int = 1

    def prompts(self, d_vocab: int) -> list[list[int]]:
        """Return token ids of each prompt, the same in every process."""
        return _draw(self.lengths, d_vocab)

    def shared_prompts(self) -> np.ndarray:
        """Return the indices of the prompts of the share."""
        return np.arange(0, len(self.lengths), self.stride)


Load = SweepLoad | ExtractLoad


def ring(n: int) -> tuple[tuple[int, int], ...]:
    """Return n pairs of n prompts: each receives once and gives once."""
    return tuple((i, (i + 1) % n) for i in range(n))


def ordered(n: int) -> tuple[tuple[int, int], ...]:
    """Return all n·(n − 1) ordered pairs of n prompts."""
    return tuple((i, j) for i in range(n) for j in range(n) if i != j)


def ragged(n: int, longest: int) -> tuple[int, ...]:
    """Return n lengths, drawn evenly from 4 to `longest`."""
    drawn = np.random.default_rng(SEED).integers(4, longest + 1, size=n)
    return tuple(drawn.tolist())


LOADS: Mapping[str, Load] = {
    load.name: load
    for load in (
        SweepLoad("sweep, T = 8", 32, 8, ring(32), 7),
        SweepLoad("sweep, T = 64", 32, 64, ring(32), 63, n_shared_blocks=1),
        SweepLoad("all pairs, T = 64", 12, 64, ordered(12), 63, n_shared_blocks=1),
        SweepLoad("many edits, T = 64", 32, 64, ring(32), 63, tuple(EDITS), n_shared_blocks=1),
        SweepLoad("early position, T = 8", 32, 8, ring(32), 3),
        SweepLoad("early position, T = 64", 32, 64, ring(32), 3, n_shared_blocks=1),
        ExtractLoad("extract, equal lengths", (32,) * 256, stride=2),
        ExtractLoad("extract, ragged", ragged(2048, 64), stride=8),
    )
}


def shrink(load: Load) -> Load:
    """Return a small version of a workload, for `--quick`: for seeing that all works."""
    if isinstance(load, ExtractLoad):
        return replace(load, lengths=load.lengths[::64], stride=min(load.stride, 2))
    pairs = ordered(3) if len(load.pairs) > load.n_prompts else ring(3)
    return replace(load, n_prompts=3, pairs=pairs, n_shared_blocks=1)


def _draw(lengths: tuple[int, ...] | list[int], d_vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(SEED)
    lowest = min(FIRST_TOKEN, d_vocab // 2)
    return [rng.integers(lowest, d_vocab, size=length).tolist() for length in lengths]
