"""Runs: facts of each model's run, side by side, compared on relative depth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from docutils import nodes

from executable_book.comparison import ModelComparison
from lib.engine.models import Decoder
from lib.evidence import runs
from lib.evidence.results import RECORD_COLUMNS, read_rows


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RUNS", tmp_path)


def run(model: str, n_blocks: int, block: float) -> dict[str, Any]:
    found = {"task": "capitals", "block": block, "low": block - 1, "high": block + 1, "n": 12}
    about = {"revision": "r1", "dtype": "float32", "device": "cpu", "versions": {"torch": "2"}}
    return {"model": model, "n_blocks": n_blocks, **about, "transitions": [found]}


def shown() -> str:
    directive = object.__new__(ModelComparison)
    return "\n".join(part.astext() for part in nodes.container("", *directive.run()).children)


def keep(*kept: dict[str, Any]) -> None:
    for about in kept:
        folder = runs.run_folder(about["model"])
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(about))


def test_facts_name_weights_precision_machine_and_versions(llama: Decoder) -> None:
    runs.keep_run(llama, [])
    (kept,) = runs.read_runs()
    assert (kept["model"], kept["revision"]) == (llama.name, "in hand")
    assert (kept["dtype"], kept["device"], kept["n_blocks"]) == ("float32", "cpu", 4)
    assert kept["versions"]["torch"] == torch.__version__
    assert kept["versions"]["transformers"] == transformers.__version__


def test_depth_counts_from_the_first_block_to_the_last() -> None:
    table = runs.relative_depths([run("a", 31, 24.0), run("b", 11, 0.0)])
    assert table["depth"].tolist() == [0.8, 0.0]
    assert table["high"].tolist() == pytest.approx([25 / 30, 0.1])
    assert table["model"].tolist() == ["a", "b"]


def test_one_run_is_said_to_be_one_and_several_are_compared() -> None:
    assert "no run yet" in shown()
    keep(run("some/first", 31, 24.0))
    assert "one run so far, that of some/first" in shown() and "0.80" not in shown()
    keep(run("second", 11, 4.0))
    assert "0.80 [0.77, 0.83], n = 12" in shown() and "0.40 [0.30, 0.50], n = 12" in shown()
    assert "one run so far" not in shown()


def test_half_a_run_is_left_out(tmp_path: Path) -> None:
    keep(run("a", 31, 24.0), run("b", 11, 4.0))
    (tmp_path / "b" / "run.json").write_text('{"model": "b", "transitions": [')
    assert [about["model"] for about in runs.read_runs()] == ["a"]


def test_records_of_each_model_lie_in_its_folder(tmp_path: Path) -> None:
    columns = dict.fromkeys(RECORD_COLUMNS, "")
    rows = [{**columns, "model": m, "untrained": u} for m in ("a/b", "c") for u in (True, False)]
    runs.keep_records(rows)
    assert read_rows(tmp_path / "a--b" / "results.json") == rows[:2]
    assert read_rows(tmp_path / "c" / "results.json") == rows[2:]
