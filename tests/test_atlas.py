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
    passed["TASKS"] = "of-one-book.csv"  # not of the runs that are compared
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


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A book whose build writes down that it ran, on which model, and what it found there."""
    for name in ("lib", "book", "benchmarks", "workflow"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("_config.yml", "_toc.yml", "requirements.txt", "environment.yml", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "recorded").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    build = tmp_path / "bin" / "build"
    build.write_text(
        '#!/bin/sh\nfound=$(cat _build/reached 2>/dev/null)\nmkdir -p "_build/runs/$1"\n'
        "echo chapter >> _build/reached\n"
        '[ -e ../../../fail ] && exit 1\necho "[]" > "_build/runs/$1/results.json"\n'
        'echo "$MODEL after $found" > "_build/runs/$1/run.json"\n'
    )
    build.chmod(0o755)
    configure(tmp_path, "smollm2-135m", "gemma-3-270m")
    return tmp_path


def configure(folder: Path, *models: str) -> None:
    (folder / "workflow" / "config.yaml").write_text(
        f"models: [{', '.join(models)}]\nbin: bin\ncommand: build $(basename $PWD)\n"
        "threads: 1\nmemory_mb: 100\n"
    )


RUNS = {"smollm2-135m": "SmolLM2-135M-Instruct-Q4_1", "gemma-3-270m": "gemma-3-270m-Q4_K_M"}


def test_models_of_the_catalogue_are_run_by_name_and_a_run_cut_short_goes_on(stubs: Path) -> None:
    (stubs / "fail").touch()
    with pytest.raises(AssertionError):
        snakemake(stubs)
    (stubs / "fail").unlink()
    snakemake(stubs)
    facts = [(stubs / "_build" / "runs" / run / "run.json").read_text() for run in RUNS.values()]
    assert [fact.split()[0] for fact in facts] == list(RUNS)
    assert any("after chapter" in fact for fact in facts)  # the one that had been cut short


def test_changed_sources_run_every_model_again(stubs: Path) -> None:
    snakemake(stubs)
    assert "Nothing to be done" in snakemake(stubs)
    page = stubs / "book" / "intro.md"
    page.write_text(page.read_text() + "\nMore.\n")
    assert "2 of 3 steps" in snakemake(stubs)


def test_two_models_of_one_name_are_refused(stubs: Path) -> None:
    folder = stubs / "models" / RUNS["gemma-3-270m"]
    folder.mkdir(parents=True)
    configure(stubs, "gemma-3-270m", str(folder))
    with pytest.raises(AssertionError, match="Two models of the list have one name"):
        snakemake(stubs)
