"""This book: one call of `sweep_blocks` or `extract_residuals`."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.contenders.base import Contender, Read, Timing
from benchmarks.workloads import EDITS, ExtractLoad, SweepLoad
from lib.engine.extraction import extract_residuals
from lib.engine.models import Decoder
from lib.engine.sweeps import sweep_blocks


class Engine(Contender):
    """The engine of lib, with its defaults."""

    def sweep(self, load: SweepLoad, read: Read, blocks: Sequence[int] | None) -> Timing:
        """Do all blocks, pairs and edits in one call.

        Raises:
            RuntimeError: the sweep fell back to a full recompute, which is not what is timed here.
        """
        wanted = range(self.decoder.n_blocks) if blocks is None else blocks
        prompts = load.prompts(self.decoder.d_vocab)
        everything = blocks is not None
        started = time.perf_counter()
        sweep = sweep_blocks(
            self.decoder,
            prompts,
            np.array(load.pairs),
            {name: EDITS[name] for name in load.edits},
            positions=[load.position] * len(prompts),
            blocks=wanted,
            read_ids=range(self.decoder.d_vocab) if everything else (),
            measure=lambda logits, _pair: {"largest": logits.amax(-1)},
        )
        seconds = time.perf_counter() - started
        if sweep.path != "prefix replay":
            raise RuntimeError(f"The sweep took the path of {sweep.path}.")
        for edit in range(len(load.edits)):
            for index, block in enumerate(wanted):
                values = sweep.logits if everything else sweep.measures["largest"][..., None]
                rows = torch.from_numpy(values[edit, index])
                read(edit, block, np.arange(len(load.pairs)), rows)
        return Timing(0.0, seconds, 1.0)

    def extract(self, load: ExtractLoad) -> tuple[Timing, np.ndarray, Tensor]:
        """Extract the share's prompts in one call."""
        every, chosen = load.prompts(self.decoder.d_vocab), load.shared_prompts()
        prompts = [every[index] for index in chosen]
        started = time.perf_counter()
        states = extract_residuals(self.decoder, prompts).states
        seconds = time.perf_counter() - started
        return Timing(0.0, seconds, len(chosen) / len(every)), chosen, states


def make(decoder: Decoder) -> Contender:
    """Return the engine around a decoder."""
    return Engine(decoder)
