"""Plans: what a sweep would cost on a model, before it is run; one that cannot fit is refused."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lib.engine.edits import Edit
from lib.engine.extraction import check_blocks
from lib.engine.memory import check_memory, free_memory, in_gigabytes
from lib.engine.models import Decoder
from lib.engine.passes import run_blocks
from lib.engine.replay import KEPT_BYTES, MAX_ROW_TOKENS
from lib.engine.sweeps import BATCH_TOKENS, position_table

COPIES = 4
"""States of one batch held at once: clean rows, edited rows, their joined form, attention."""


@dataclass(frozen=True)
class Plan:
    """What a sweep would cost.

    Attributes:
        n_parameters: of the model.
        weight_bytes: of the model, as loaded.
        working_bytes: what the sweep needs beside the weights, an upper bound.
        free_bytes: what is free where the model takes its tokens.
        n_rows: edited rows, one an edit, block and pair; a full recompute makes as many passes.
        replay_operations: multiply–accumulates of prefix replay.
        recompute_operations: those of a full recompute.
        seconds: rough time of prefix replay, from one small pass.
        recompute_seconds: the same for a full recompute.
    """

    n_parameters: int
    weight_bytes: int
    working_bytes: int
    free_bytes: int
    n_rows: int
    replay_operations: float
    recompute_operations: float
    seconds: float
    recompute_seconds: float

    def __str__(self) -> str:
        return (
            f"{self.n_parameters:,} parameters in {in_gigabytes(self.weight_bytes)}; "
            f"{self.n_rows:,} edited rows need {in_gigabytes(self.working_bytes)} of "
            f"{in_gigabytes(self.free_bytes)} free; {self.replay_operations:.1e} "
            f"multiply–accumulates, about {self.seconds:.0f} s (full recompute: "
            f"{self.recompute_operations:.1e}, about {self.recompute_seconds:.0f} s)"
        )


def plan_sweep(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    pairs: np.ndarray,
    edits: Mapping[str, Edit],
    *,
    positions: np.ndarray | Sequence[int] | str,
    blocks: Sequence[int] | None = None,
    n_read: int = 0,
) -> Plan:
    """Return what `sweep_blocks` would cost with these arguments, without running it.

    Operations count a token and block as that block's parameters, and a beginning that prompts
    share for each of them; attention over the prompt comes on top, and of a mixture of experts
    fewer take part. The time scales that of one pass of one prompt, so it is rough, and it knows
    nothing of the unembedding.

    Args:
        decoder: the model.
        prompts: as `sweep_blocks`, like the following ones.
        pairs: recipient and donor `[n_pairs, 2]`.
        edits: named edits.
        positions: where the edits are made.
        blocks: blocks to edit after, all by default.
        n_read: number of tokens whose logits are read.

    Raises:
        ValueError: as `sweep_blocks`; or the sweep needs more memory than is free.
    """
    wanted = check_blocks(decoder, blocks)
    where = position_table(prompts, positions)
    recipients, counts = np.unique(np.asarray(pairs)[:, 0], return_counts=True)
    sizes = np.array([sum(p.numel() for p in block.parameters()) for block in decoder.blocks])
    later = np.array([sizes[block + 1 :].sum() for block in wanted])
    replay = recompute = 0.0
    for recipient, n_pairs in zip(recipients, counts * len(edits), strict=True):
        length = len(prompts[recipient])
        row_length = length - int(where[recipient].min())
        replay += length * sizes.sum() + n_pairs * row_length * later.sum()
        recompute += n_pairs * len(wanted) * length * sizes.sum()
    n_rows = len(edits) * len(wanted) * len(pairs)
    n_tokens = max(BATCH_TOKENS, MAX_ROW_TOKENS, *(len(prompt) for prompt in prompts))
    working = 4 * decoder.d_model * decoder.n_blocks * n_tokens * COPIES
    working += 4 * decoder.d_model * len(wanted) * len(prompts) * where.shape[1]  # donors
    working += 4 * n_rows * (n_read + 4)
    n_run = sum(len(prompt) for prompt in prompts)  # forests kept: states, keys and values
    working += min(KEPT_BYTES, 8 * decoder.d_model * decoder.n_blocks * n_run)
    free = free_memory()
    there = free.get(str(decoder.device), free["cpu"])
    check_memory(f"This sweep on {decoder.name}", working, str(decoder.device), free)
    rate = _operations_a_second(decoder, prompts[recipients[0]], float(sizes.sum()))
    weights = list(decoder.model.parameters())
    return Plan(
        n_parameters=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        working_bytes=int(working),
        free_bytes=there,
        n_rows=n_rows,
        replay_operations=replay,
        recompute_operations=recompute,
        seconds=replay / rate,
        recompute_seconds=recompute / rate,
    )


def _operations_a_second(decoder: Decoder, prompt: Sequence[int], per_token: float) -> float:
    """Return multiply–accumulates a second in one pass of one prompt, after one to warm up."""
    tokens = torch.tensor([list(prompt)], device=decoder.device)
    for _ in range(2):
        began = time.perf_counter()
        run_blocks(decoder, tokens, {decoder.n_blocks - 1})[decoder.n_blocks - 1].float().cpu()
        took = time.perf_counter() - began
    return per_token * len(prompt) / max(took, 1e-9)
