"""Runs: what each model's run was and found, kept side by side for comparison."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lib.engine.files import write_atomically
from lib.evidence.results import RESULTS, Record, library_versions, write_rows

if TYPE_CHECKING:  # the build reads runs without loading torch
    from lib.engine.models import Decoder

RUNS = RESULTS.parent / "runs"


def model_facts(decoder: "Decoder") -> dict[str, Any]:
    """Return what a model's records depend on beside the code: weights, precision, versions.

    `lib.evidence.results.run_facts` says the same of a build, which needs no model in memory.
    """
    devices = sorted({str(parameter.device) for parameter in decoder.model.parameters()})
    return {
        "model": decoder.name,
        "revision": decoder.revision,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": ", ".join("offloaded" if device == "meta" else device for device in devices),
        "n_blocks": decoder.n_blocks,
        "versions": library_versions(),
    }


def run_folder(model: str) -> Path:
    """Return the folder of a model's run, from the name that its records carry."""
    return RUNS / re.sub(r"[^A-Za-z0-9._-]+", "--", model)


def keep_run(decoder: "Decoder", transitions: Sequence[dict[str, Any]]) -> None:
    """Keep the facts of a run and its tasks' transitions, in `run.json` of the model's folder."""
    about = {**model_facts(decoder), "transitions": list(transitions)}
    write_atomically(run_folder(decoder.name) / "run.json", json.dumps(about, indent=1) + "\n")


def keep_records(rows: Sequence[Record]) -> None:
    """Keep each model's records, its twin's among them, in `results.json` of its folder."""
    for model in {row["model"] for row in rows}:
        chosen = [row for row in rows if row["model"] == model]
        write_rows(run_folder(model) / "results.json", chosen)


def read_runs(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the runs kept, sorted by model; one that cannot be read is left out."""
    runs = []
    for file in sorted((folder or RUNS).glob("*/run.json")):
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            runs.append({**run, "transitions": list(run["transitions"]), "model": run["model"]})
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half a file, or another's: the next run of that model mends it
    return runs


def relative_depths(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return the tasks' transitions as shares of each model's depth.

    Columns `model`, `task`, `depth`, `low`, `high`, `n`. A transition between blocks is at ℓ*, a
    number from 0 to L − 1; its depth is ℓ* / (L − 1).
    """
    rows = [
        {
            "model": run["model"],
            "task": found["task"],
            "depth": found["block"] / (run["n_blocks"] - 1),
            "low": found["low"] / (run["n_blocks"] - 1),
            "high": found["high"] / (run["n_blocks"] - 1),
            "n": found["n"],
        }
        for run in runs
        for found in run["transitions"]
    ]
    return pd.DataFrame(rows, columns=["model", "task", "depth", "low", "high", "n"])
