"""Try the engine on every causal architecture of transformers: `make architectures`.

Each is built tiny from its configuration, with random weights, and extraction, logit lens and
sweeps at the last and at an earlier token are compared with full recomputes by hooks. The table
goes to `lib/data/architectures.csv`; arguments choose some by name, whose rows are only printed.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import oracle
import pandas as pd
import torch
from conftest import tiny_model, tiny_tokenizer
from tiny import text_part
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lib.engine.edits import exchange, exchange_direction
from lib.engine.extraction import extract_residuals
from lib.engine.files import DATA
from lib.engine.models import Decoder, load_decoder
from lib.engine.sweeps import sweep_blocks

PROMPTS = [[5, 9, 4, 33, 12, 8, 51], [5, 9, 17, 20, 6, 44, 9], [11, 30, 22, 7, 35]]
PAIRS = np.array([[0, 1], [1, 2], [2, 0]])
SITES = {"last": [6, 6, 4], "earlier": [3, 2, 2]}
COLUMNS = [
    "architecture", "model_class", "outcome", "last_path", "earlier_path", "extraction", "lens",
    "last", "earlier", "reason",
]  # fmt: skip
EDITS = {"exchange": exchange, "direction": exchange_direction}


def examine(architecture: str) -> dict[str, Any]:
    """Return one row of the table: how a tiny model of an architecture is read, and how exactly.

    `reason` says why it is refused; differences are those of the largest logit or coordinate.
    """
    try:
        model = tiny_model(architecture)
    except Exception as error:  # no small configuration of it is known
        return {"architecture": architecture, "outcome": "not built", "reason": _line(error)}
    row: dict[str, Any] = {"architecture": architecture, "model_class": type(model).__name__}
    try:
        decoder = load_decoder(model, tokenizer=tiny_tokenizer())
    except ValueError as refusal:
        if "\n" in str(refusal):
            raise
        return row | {"outcome": "refused", "reason": str(refusal)}
    row |= differences(decoder)
    worst = max(row[name] for name in ("extraction", "lens", *SITES))
    return row | {"outcome": "exact" if worst < 1e-4 else "inexact"}


def differences(decoder: Decoder) -> dict[str, Any]:
    """Return paths, and largest differences from full recomputes relative to the largest value."""
    states = [oracle.block_states(decoder.model, decoder.blocks, prompt) for prompt in PROMPTS]
    read = extract_residuals(decoder, PROMPTS, logits=True)
    logits = torch.cat([oracle.forward(decoder.model, [prompt]) for prompt in PROMPTS])
    assert read.logits is not None
    row: dict[str, Any] = {
        "extraction": _difference(read.states, torch.stack([state[:, -1] for state in states], 1)),
        "lens": _difference(read.logits, logits),
    }
    for site, positions in SITES.items():
        found = sweep_blocks(
            decoder, PROMPTS, PAIRS, EDITS, positions=positions, read_ids=range(decoder.d_vocab)
        )
        row[f"{site}_path"] = found.path
        expected = torch.stack(list(_recomputed(decoder, states, positions)))
        row[site] = _difference(torch.from_numpy(found.logits).flatten(0, 1), expected)
    return row


def _recomputed(
    decoder: Decoder, states: Sequence[torch.Tensor], positions: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Yield the logits `[n_pairs, d_vocab]` of each edit and block, from one pass a pair."""
    for edit in EDITS.values():
        for index, block in enumerate(decoder.blocks):
            logits = [
                oracle.patched_logits(
                    decoder.model,
                    block,
                    [PROMPTS[r]],
                    [positions[r]],
                    [edit(states[r][index, positions[r]], states[d][index, positions[d]])],
                )
                for r, d in PAIRS.tolist()
            ]
            yield torch.cat(logits)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def main() -> None:
    logging.set_verbosity_error()
    rows = []
    for name in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            part = text_part(name)
        except Exception:
            part = name  # not passed over: examining it fails in the same way, and says why
        try:
            row = examine(name) if part == name else {"outcome": "see text part", "reason": part}
        except Exception as error:  # a foreign error is what the table is there to show
            row = {"outcome": "failed", "reason": _line(error)}
        row = {"architecture": name} | row
        rows.append(row)
        print(*(f"{v:.1e}" if isinstance(v, float) else v for v in row.values()), flush=True)
    if not sys.argv[1:]:
        table = pd.DataFrame(rows, columns=COLUMNS)
        table.to_csv(DATA / "architectures.csv", index=False, float_format="%.1e")
        print(table["outcome"].value_counts().to_string())


if __name__ == "__main__":
    main()
