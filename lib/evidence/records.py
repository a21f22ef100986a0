"""Records: what a chapter found, as rows, and where they lie; what each model's run was.

A record is a row of `lib.evidence.criteria.judge`, or one that is shown without a criterion.
Between the chapters of a build each claim has a file; a finished build has `results.json`, and each
model a folder of its own, so that several models' runs stand side by side.
"""

import contextlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lib.engine.catalogue import DEFAULT, catalogue, find_weights, folder_name
from lib.engine.files import BUILD, ROOT, write_atomically
from lib.evidence.criteria import VERDICTS, Record, is_held_out, without_record
from lib.science.estimate import Measured, Untested, is_own

if TYPE_CHECKING:  # the build reads records without loading torch
    from lib.engine.models import Decoder

RESULTS = BUILD / "results"
RUNS = BUILD / "runs"
RECORDED = ROOT / "tests" / "recorded"
EXPLORATIONS = "explorer.json"
"""The file of a run's folder that holds what the depth explorer shows of it."""
SHOWN = "shown"
"""The verdict of a record that no criterion judges."""
SIGNS = {
    "supported": "●",
    "refuted": "○",
    "undecided": "◐",
    "not testable": "–",
    "shown": "·",
}
"""A verdict's shape, in tables and figures: no verdict rests on colour."""
KEY = ("claim", "statistic", "place", "model", "untrained")
"""What tells records apart."""
FIELDS = (
    *("claim", "part", "statistic", "place", "model", "untrained", "estimate", "low", "high"),
    *("level", "n", "criterion", "verdict", "architecture", "held_out", "reason"),
)
LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "scipy", "pandas"),
    *("scikit-learn", "jupyter-book", "myst-nb"),
)


def shown(
    claim: str,
    model: str,
    statistic: str,
    measured: Mapping[str, Measured],
    *,
    untrained: bool = False,
) -> list[Record]:
    """Return records of numbers that no criterion judges, such as the tasks' transitions.

    Args:
        claim: the chapter's name.
        model: the model's name.
        statistic: the number's name.
        measured: an estimate of one number by place, a task's name say.
        untrained: whether they are the twins'.
    """
    rows = []
    for place, one in measured.items():
        row = dict.fromkeys(FIELDS) | {"claim": claim, "part": "", "statistic": statistic}
        row |= {"place": place, "model": model, "untrained": untrained, "level": 0.95, "n": 0}
        row |= {"criterion": "", "verdict": SHOWN, "architecture": False, "reason": ""}
        row["held_out"] = is_held_out(place)
        if isinstance(one, Untested):
            row |= {"verdict": "not testable", "reason": one.reason}
        else:
            low, high = map(float, one.interval())
            row |= {"estimate": float(one), "low": low, "high": high, "n": one.n_units}
        rows.append(row)
    return rows


def check(rows: Sequence[Record]) -> list[Record]:
    """Return records as JSON knows them, each checked.

    Raises:
        ValueError: a field that is missing, an unknown verdict, a number that is NaN or infinite,
            a judged record without its numbers, two records with one key.
    """
    seen: set[tuple[Any, ...]] = set()
    result = []
    for row in rows:
        if missing := [field for field in FIELDS if field not in row]:
            raise ValueError(
                f"A record lacks {', '.join(missing)}; make it with `judge` or `shown`."
            )
        plain = {field: _plain(row[field]) for field in FIELDS}
        name = f"Record {plain['claim']}, {plain['statistic']}, {plain['place']}"
        numbers = [plain[field] for field in ("estimate", "low", "high")]
        if plain["verdict"] not in (*VERDICTS, SHOWN):
            known = ", ".join((*VERDICTS, SHOWN))
            raise ValueError(f"{name}: {plain['verdict']!r} is no verdict; choose among {known}.")
        if any(number is not None and not math.isfinite(number) for number in numbers):
            raise ValueError(
                f"{name}: holds a number that is NaN or infinite; give Untested instead."
            )
        if None in numbers and plain["verdict"] != "not testable":
            raise ValueError(f"{name}: {plain['verdict']!r} needs an estimate with its interval.")
        if key_of(plain) in seen:
            raise ValueError(f"{name}: recorded twice; give each place one record.")
        seen.add(key_of(plain))
        result.append(plain)
    return result


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a record from all others."""
    return tuple(row[field] for field in KEY)


def to_json(rows: Sequence[Record]) -> str:
    """Return records as JSON text, the same for the same records to the last digit."""
    return json.dumps(list(rows), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def claim_file(claim: str) -> Path:
    """Return the file that holds a claim's records between the chapters of a build."""
    return RESULTS / f"{claim}.json"


def results_file() -> Path:
    """Return the file that holds all records of a finished build."""
    return RESULTS / "results.json"


def run_file() -> Path:
    """Return the file that says how the results of a build were computed."""
    return RESULTS / "run.json"


def write_records(file: Path, rows: Sequence[Record]) -> None:
    """Write records, whole or not at all; a file that says the same already is left alone.

    Raises:
        ValueError: as `check`.
    """
    text = to_json(check(rows))
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomically(file, text)


def read_records(file: Path) -> list[Record]:
    """Return the records of a file; none if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.is_file():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return check(rows)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file.name} does not hold records: {error} Build the book anew."
        ) from None


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results rest on, where installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # the book's own tools are not on Colab
            found[name] = version(name)
    return found


def run_facts() -> dict[str, str | int]:
    """Return what a build rests on: model, machine, threads, versions of libraries, time."""
    import torch  # late, for it takes seconds: few who need records need the facts of a run

    model = os.environ.get("MODEL") or DEFAULT
    weights = find_weights(model)
    facts: dict[str, str | int] = {
        "built": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "model": model,
        "model_sha256": weights.sha256 if weights else "not recorded",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count() or 1,
        "platform": platform.platform(),
    }
    if tasks := os.environ.get("TASKS"):
        facts["own_tasks"] = tasks
    return facts | {f"version_of_{name}": number for name, number in library_versions().items()}


def model_facts(decoder: "Decoder") -> dict[str, Any]:
    """Return what a model's records depend on beside the code: weights, precision, versions."""
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
    return RUNS / folder_name(model)


def keep_run(decoder: "Decoder") -> None:
    """Keep the facts of a model's run, in `run.json` of its folder."""
    facts = json.dumps(model_facts(decoder), indent=1) + "\n"
    write_atomically(run_folder(decoder.name) / "run.json", facts)


def keep_records(rows: Sequence[Record]) -> None:
    """Keep each model's records, its twins' among them, in `results.json` of its folder.

    Those of a reader's own tasks are left out: runs are compared on the book's.
    """
    rows = [row for row in rows if not is_own(row["place"])]
    for model in {row["model"] for row in rows}:
        chosen = [row for row in rows if row["model"] == model]
        write_records(run_folder(model) / "results.json", chosen)


def recorded_file(model: str) -> Path:
    """Return the file of a model's reviewed records."""
    return RECORDED / f"{folder_name(model)}.json"


def recorded_files() -> list[Path]:
    """Return the files of all models' reviewed records."""
    others = (*RECORDED.glob("*.run.json"), *RECORDED.glob(f"*.{EXPLORATIONS}"))
    return sorted(set(RECORDED.glob("*.json")) - set(others))


def record_run(model: str, rows: Sequence[Record]) -> None:
    """Record a model's results as reviewed, with the facts of its run, the date and the commit.

    What the depth explorer shows of it is recorded, too, where the run has come to it.
    """
    file = recorded_file(model)
    write_records(file, rows)
    facts = run_folder(model) / "run.json"
    if facts.is_file():
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        run = json.loads(facts.read_text(encoding="utf-8"))
        run |= {"recorded": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit.strip() or "unknown"}
        write_atomically(file.with_name(f"{file.stem}.run.json"), json.dumps(run, indent=1) + "\n")
    explored = run_folder(model) / EXPLORATIONS
    if explored.is_file():
        told = explored.read_text(encoding="utf-8")
        write_atomically(file.with_name(f"{file.stem}.{EXPLORATIONS}"), told)


def catalogue_place(model: str) -> int:
    """Return a model's place in the catalogue by its label; models not in it come last."""
    labels = [weights.label for weights in catalogue().values()]
    return labels.index(model) if model in labels else len(labels)


def read_runs() -> list[dict[str, Any]]:
    """Return a run of each model, sorted by model: its facts, its `records`, and its `source`.

    Those kept by a build here count before those recorded, unless it was cut short and left no
    records. A run whose files cannot be read is left out; the next run of that model mends it. So
    is a claim for which a criterion came after the run: it has no verdict until it is run again.
    """
    runs: dict[str, dict[str, Any]] = {}
    recorded = {
        file: file.with_name(file.name.replace(".run.json", ".json"))
        for file in sorted(RECORDED.glob("*.run.json"))
    }
    kept = {file: file.with_name("results.json") for file in sorted(RUNS.glob("*/run.json"))}
    for file, records in {**recorded, **kept}.items():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            run = json.loads(file.read_text(encoding="utf-8"))
            source = "computed here"
            if file in recorded:
                source = f"recorded on {run['recorded']}, commit {run['commit']}"
            run |= {"n_blocks": int(run["n_blocks"]), "source": source}
            rows = read_records(records)
            unjudged = {one.claim for one in without_record(rows)}
            run["records"] = [row for row in rows if row["claim"] not in unjudged]
            if run["records"] or run["model"] not in runs:
                runs[run["model"]] = run
    return [runs[model] for model in sorted(runs)]


def pages(root: Path = ROOT) -> list[str]:
    """Return the book's pages in reading order as paths without suffix, from _toc.yml."""
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
