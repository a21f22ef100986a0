"""What a contender is, and the loop over blocks and batches of those that run whole prompts."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import EDITS, ExtractLoad, SweepLoad
from lib.engine.edits import Edit
from lib.engine.models import Decoder

Read = Callable[[int, int, np.ndarray, Tensor], None]
"""Takes edit, block, pairs `[n]` and their full logits `[n, d_vocab]`."""

BATCHES = (8, 32, 128)
PADDING = 2  # what stands there is masked


@dataclass(frozen=True)
class Timing:
    """Seconds for a share of a workload: `fixed` for all of it, `scaled` for the share."""

    fixed: float
    scaled: float
    share: float

    @property
    def seconds(self) -> float:
        """Seconds for the whole workload."""
        return self.fixed + self.scaled / self.share


class Contender(ABC):
    """Does the workloads with one library, around the same model."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @abstractmethod
    def sweep(self, load: SweepLoad, read: Read, blocks: Sequence[int] | None) -> Timing:
        """Do a sweep and hand the full logits of every row to `read`, in batches.

        `blocks` limits it to a share, for comparing all logits; None is what is timed.
        """

    @abstractmethod
    def extract(self, load: ExtractLoad) -> tuple[Timing, np.ndarray, Tensor]:
        """Return states `[n_blocks, n, d_model]` and the indices `[n]` of their prompts."""

    def tune(self, load: SweepLoad | ExtractLoad) -> int | None:  # noqa: ARG002
        """Choose the batch size that is fastest here, and return it; None if there is none."""
        return None


class WholePrompts(Contender):
    """A contender that runs whole prompts, a batch of them at a time, for each block and edit."""

    batch = BATCHES[0]
    sort_by_length = False

    @abstractmethod
    def states(self, tokens: Tensor, mask: Tensor | None, position: int) -> Tensor:
        """Return the states `[n_blocks, n, d_model]` at `position` of tokens `[n, length]`.

        `mask` `[n, length]` is 0 at left padding; None where there is none.
        """

    @abstractmethod
    def patched(
        self, tokens: Tensor, block: int, position: int, edit: Edit, donors: Tensor
    ) -> Tensor:
        """Return last-token logits `[n, d_vocab]` with `edit` made after `block` at `position`."""

    def sweep(self, load: SweepLoad, read: Read, blocks: Sequence[int] | None) -> Timing:
        """Do the share's blocks, one pass for each batch of pairs and each edit."""
        prompts = torch.tensor(load.prompts(self.decoder.d_vocab))
        pairs = torch.tensor(load.pairs)
        started = time.perf_counter()
        donors = torch.cat(
            [self.states(part, None, load.position) for part in prompts.split(self.batch)], dim=1
        )
        between = time.perf_counter()
        chosen = load.shared_blocks(self.decoder.n_blocks) if blocks is None else tuple(blocks)
        for block in chosen:
            for index, name in enumerate(load.edits):
                for rows in torch.arange(len(pairs)).split(self.batch):
                    recipient, donor = pairs[rows].T
                    logits = self.patched(
                        prompts[recipient], block, load.position, EDITS[name], donors[block, donor]
                    )
                    read(index, block, rows.numpy(), logits)
        ended = time.perf_counter()
        return Timing(between - started, ended - between, len(chosen) / self.decoder.n_blocks)

    def extract(self, load: ExtractLoad) -> tuple[Timing, np.ndarray, Tensor]:
        """Run the share's prompts in batches, left-padded where lengths differ."""
        prompts = load.prompts(self.decoder.d_vocab)
        chosen = load.shared_prompts()
        started = time.perf_counter()
        states = torch.empty(self.decoder.n_blocks, len(chosen), self.decoder.d_model)
        order = np.arange(len(chosen))
        if self.sort_by_length:
            order = np.argsort([len(prompts[i]) for i in chosen], kind="stable")
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            tokens, mask = pad([prompts[i] for i in chosen[rows]])
            states[:, rows] = self.states(tokens, mask, tokens.shape[1] - 1)
        seconds = time.perf_counter() - started
        return Timing(0.0, seconds, len(chosen) / len(prompts)), chosen, states

    def tune(self, load: SweepLoad | ExtractLoad) -> int:
        """Time each batch size on the middle block, or on part of the prompts; keep the best."""
        n_rows = len(load.pairs) if isinstance(load, SweepLoad) else len(load.shared_prompts())
        seconds = {}
        for batch in [size for size in BATCHES if size < 2 * n_rows or size == BATCHES[0]]:
            self.batch = batch
            seconds[batch] = min(self._once(load, n_rows) for _ in range(2))
        self.batch = min(seconds, key=lambda size: seconds[size])
        return self.batch

    def _once(self, load: SweepLoad | ExtractLoad, n_rows: int) -> float:
        """Return seconds per row of one or a few batches."""
        rows = torch.arange(min(n_rows, max(self.batch, 64)))
        if isinstance(load, ExtractLoad):
            prompts = load.prompts(self.decoder.d_vocab)[: len(rows)]
            part = ExtractLoad(load.name, tuple(len(prompt) for prompt in prompts))
            return self.extract(part)[0].scaled / len(rows)
        tokens = torch.tensor(load.prompts(self.decoder.d_vocab))
        recipient, donor = torch.tensor(load.pairs)[rows].T
        states = torch.randn(len(tokens), self.decoder.d_model)
        started = time.perf_counter()
        for part in rows.split(self.batch):
            block = self.decoder.n_blocks // 2
            edit = EDITS[load.edits[0]]
            self.patched(tokens[recipient[part]], block, load.position, edit, states[donor[part]])
        return (time.perf_counter() - started) / len(rows)


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Return left-padded tokens and their mask, None where nothing is padded."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[PADDING] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return tokens, None if bool(mask.all()) else mask


def padding_inputs(mask: Tensor | None) -> dict[str, Tensor]:
    """Return the arguments that tell a transformers model what is padding and what is not."""
    if mask is None:
        return {}
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
