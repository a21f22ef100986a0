"""The atlas: the book on several models by one command, each run kept, none done twice."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_second_model import copy_book, save_tiny_model

from lib.evidence.records import ROOT

SNAKEMAKE = ROOT / "build" / "tools" / "bin" / "snakemake"
DEPTHS = {"tiny-six": 6, "tiny-eight": 8}
CONFIG = """\
models: [models/tiny-six, models/tiny-eight]
bin: {bin}
command: jupyter-book build . --warningiserror --keep-going
threads: 1
memory_mb: 100
"""

pytestmark = pytest.mark.atlas


def snakemake(folder: Path) -> str:
    command = [SNAKEMAKE, "--snakefile", "workflow/Snakefile", "--cores", "2"]
    passed = {name: value for name, value in os.environ.items() if name != "PROGRESS_FILE"}
    done = subprocess.run(
        command, cwd=folder, env=passed, capture_output=True, text=True, check=False
    )
    logs = [file.read_text()[-3000:] for file in (folder / "build" / "logs").glob("*.log")]
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(logs)
    return done.stdout + done.stderr


def test_two_models_are_run_and_kept_and_only_what_is_missing_is_run_again(tmp_path: Path) -> None:
    copy_book(tmp_path)
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    (tmp_path / "tests" / "recorded").mkdir(parents=True)
    (tmp_path / "workflow" / "config.yaml").write_text(CONFIG.format(bin=ROOT / ".venv" / "bin"))
    for name, n_blocks in DEPTHS.items():
        save_tiny_model(tmp_path / "models" / name, n_blocks)

    snakemake(tmp_path)
    runs = tmp_path / "_build" / "runs"
    for name, n_blocks in DEPTHS.items():
        assert json.loads((runs / name / "run.json").read_text())["n_blocks"] == n_blocks
        rows = json.loads((runs / name / "results.json").read_text())
        assert {row["model"] for row in rows} == {name}
        assert {row["claim"] for row in rows} >= {"phase-transition", "inside-the-switch"}

    assert "Nothing to be done" in snakemake(tmp_path)
    kept = (runs / "tiny-eight" / "results.json").stat().st_mtime_ns
    (runs / "tiny-six" / "results.json").unlink()
    snakemake(tmp_path)
    assert (runs / "tiny-six" / "results.json").is_file()
    assert (runs / "tiny-eight" / "results.json").stat().st_mtime_ns == kept
