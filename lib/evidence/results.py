"""Records of verdicts: what one looks like, where they are kept, which chapters owe them."""

import contextlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lib.engine.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "_build" / "results"

RECORD_COLUMNS = (
    "claim",
    "part",
    "task",
    "model",
    "untrained",
    "statistic",
    "estimate",
    "ci_low",
    "ci_high",
    "criterion",
    "n",
    "verdict",
)
KEY_COLUMNS = ("claim", "part", "task", "model", "untrained", "statistic")
"""What tells records apart: no two of a book agree in all of these."""

LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "scipy", "pandas"),
    *("scikit-learn", "scikit-dimension", "jupyter-book", "myst-nb"),
)

VERDICTS = ("supported", "not supported", "not testable")

Record = dict[str, Any]


def to_rows(records: pd.DataFrame) -> list[Record]:
    """Returns the checked records of one claim as plain dictionaries, ready for JSON.

    Args:
        records: one row per statistic, with at least the columns `RECORD_COLUMNS`. Numbers may be
            missing (NaN, None) where nothing could be measured; they become None.

    Raises:
        ValueError: if a column is missing, the claims are mixed, a verdict is unknown, a number is
            infinite, an estimate is missing where a verdict was reached, or two rows have the same
            key.
    """
    missing = [column for column in RECORD_COLUMNS if column not in records.columns]
    if missing:
        raise ValueError(f"Records lack the columns {', '.join(missing)}.")
    claims = sorted(set(records["claim"]))
    if len(claims) != 1:
        raise ValueError(f"Expected records of one claim, got {claims or 'no record'}.")
    columns = [*RECORD_COLUMNS, *(c for c in records.columns if c not in RECORD_COLUMNS)]
    rows = [
        {column: plain(value) for column, value in zip(columns, row, strict=True)}
        for row in records[columns].itertuples(index=False, name=None)
    ]
    seen = set()
    for row in rows:
        _check(row)
        if key_of(row) in seen:
            raise ValueError(f"{_name(row)}: recorded twice. Give each statistic one row.")
        seen.add(key_of(row))
    return rows


def to_json(rows: list[Record]) -> str:
    """Returns rows as JSON text, the same for the same rows to the last digit."""
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what tells a record from all others."""
    return tuple(row[column] for column in KEY_COLUMNS)


def records_file(claim: str, folder: Path = RESULTS) -> Path:
    """Returns the file that holds one claim's records between the chapters of a build."""
    return folder / f"{claim}.json"


def results_file(folder: Path = RESULTS) -> Path:
    """Returns the file that holds all records of a finished build."""
    return folder / "results.json"


def run_file(folder: Path = RESULTS) -> Path:
    """Returns the file that says how the results of a build were computed."""
    return folder / "run.json"


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that results rest on, where installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # the book's own tools are not on Colab
            found[name] = version(name)
    return found


def run_facts(root: Path = ROOT) -> dict[str, str | int]:
    """Returns what a build rests on, a flat table of facts: model, machine, versions, seeds, time.

    The seeds are those of the pages of the book that state one (`SEED = 11`).
    """
    import torch  # late, for it takes seconds: few who need records need the facts of a run

    from lib.engine.catalogue import find_weights

    model = os.environ.get("MODEL") or "embedded"
    weights = find_weights(model)
    facts: dict[str, str | int] = {
        "built": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "model": model,
        "model_sha256": weights.sha256 if weights else "not recorded",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count() or 1,
        "platform": platform.platform(),
    }
    versions = library_versions()
    facts["python"] = versions.pop("python")
    facts |= {f"version_of_{name}": number for name, number in versions.items()}
    for page in pages(root):
        text = (root / f"{page}.md").read_text(encoding="utf-8")
        if found := re.search(r"^SEED = (\d+)", text, re.M):
            facts[f"seed_of_{Path(page).name}"] = int(found[1])
    return facts


def write_rows(file: Path, rows: list[Record]) -> None:
    """Writes rows as JSON, whole or not at all; a file that already says the same is left alone."""
    text = to_json(rows)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomically(file, text)


def read_rows(file: Path) -> list[Record]:
    """Returns the rows of a file of records.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold a list of records.
    """
    rows = json.loads(file.read_text(encoding="utf-8"))
    columns = set(RECORD_COLUMNS)
    if not isinstance(rows, list) or not all(columns <= set(row) for row in rows):
        raise ValueError(f"{file} does not hold a list of records.")
    return rows


def read_records(claim: str) -> pd.DataFrame | None:
    """Returns what the chapter of a claim recorded, or None if it has not run."""
    file = records_file(claim)
    return pd.DataFrame(read_rows(file)) if file.is_file() else None


def pages(root: Path = ROOT) -> list[str]:
    """Returns the book's pages in reading order as paths without suffix, from _toc.yml."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *_files(toc)]


def _files(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _files(item)
    elif isinstance(node, dict):
        if "file" in node:
            yield node["file"]
        for key in ("parts", "chapters", "sections"):
            yield from _files(node.get(key))


def plain(value: Any) -> Any:
    """Returns a value as JSON knows it: NumPy scalars unpacked, NaN and NA as None.

    Raises:
        ValueError: if the value is infinite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("A record holds an infinite number; expected a finite one or NaN.")
    return value


def _check(row: Mapping[str, Any]) -> None:
    if row["verdict"] not in VERDICTS:
        known = ", ".join(map(repr, VERDICTS))
        raise ValueError(f"{_name(row)}: verdict {row['verdict']!r} is none of {known}.")
    if not isinstance(row["untrained"], bool):
        got = repr(row["untrained"])
        raise ValueError(f"{_name(row)}: expected untrained True or False, got {got}.")
    if isinstance(row["n"], bool) or not isinstance(row["n"], int):
        raise ValueError(f"{_name(row)}: expected a whole number n, got {row['n']!r}.")
    if row["verdict"] != "not testable" and row["estimate"] is None:
        raise ValueError(f"{_name(row)}: the verdict {row['verdict']!r} needs an estimate.")


def _name(row: Mapping[str, Any]) -> str:
    return f"Record of {row['claim']}, {row['part']}, {row['task']}, {row['statistic']}"
