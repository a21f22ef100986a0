import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from lib.engine.progress import PROGRESS_CHAPTER, PROGRESS_FILE, track
from lib.evidence import results
from lib.evidence.results import read_records, to_json, to_rows
from lib.reading import notebook
from lib.reading.notebook import estimate_text, glue, record, table_html

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    yield InteractiveShell.instance(history_length=0)
    InteractiveShell.clear_instance()


def one_record(**changes: object) -> dict[str, object]:
    return {
        "claim": "phase-transition",
        "part": "switch",
        "task": "capitals",
        "model": "embedded",
        "untrained": False,
        "statistic": "width",
        "estimate": 0.1,
        "ci_low": 0.05,
        "ci_high": 0.2,
        "criterion": "upper bound ≤ 0.25",
        "n": 96,
        "verdict": "supported",
    } | changes


def glued(output: object) -> tuple[str, dict[str, str]]:
    name = output.metadata["scrapbook"]["name"]  # type: ignore[attr-defined]
    return name, output.data  # type: ignore[attr-defined]


# Numbers and words for the prose


def test_glued_number_is_carried_but_not_shown(shell):
    with capture_output() as captured:
        glue("rho", np.float64(0.625))
    name, data = glued(captured.outputs[0])
    assert (name, data) == ("rho", {"application/papermill.record/text/plain": "0.625"})
    assert captured.stdout == ""


def test_glue_writes_what_the_book_builder_writes(shell):
    import myst_nb

    for value in (0.5, 3, "sharper", True):
        with capture_output() as ours:
            glue("key", value)
        with capture_output() as theirs:
            myst_nb.glue("key", value, display=False)
        assert ours.outputs[0].data == theirs.outputs[0].data
        assert ours.outputs[0].metadata == theirs.outputs[0].metadata


def test_format_applied_when_gluing_keeps_trailing_zeros(shell):
    with capture_output() as captured:
        glue("rho", 0.5, ".3f")
    assert glued(captured.outputs[0])[1]["application/papermill.record/text/plain"] == "'0.500'"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_glue_refuses_what_is_no_number(value):
    with pytest.raises(ValueError, match="glue 'rho'"):
        glue("rho", value)


def test_glue_refuses_a_whole_table():
    with pytest.raises(ValueError, match="got DataFrame"):
        glue("table", pd.DataFrame())


def test_chapters_run_where_the_book_builder_is_absent():
    code = "import sys; sys.modules['myst_nb'] = None; from lib.reading.notebook import glue; glue('a', 1)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_estimate_reads_as_prose_quotes_it():
    assert estimate_text(0.62, 0.55, 0.68, 96) == "0.62 [0.55, 0.68], n = 96 prompts"
    assert estimate_text(3.9, 3, 4.25, 5, "nats", items="contexts", decimals=1) == (
        "3.9 nats [3.0, 4.2], n = 5 contexts"
    )


def test_small_and_negative_numbers_do_not_become_zero_or_hyphens():
    assert estimate_text(0.0004, -0.001, 0.2, 7) == "0.0004 [\u22120.001, 0.20], n = 7 prompts"
    assert estimate_text(0.0, 0.0, 0.0, 7) == "0.00 [0.00, 0.00], n = 7 prompts"


@pytest.mark.parametrize("numbers", [(float("nan"), 0, 1), (0.5, 0.6, 0.4)])
def test_estimate_with_impossible_interval_is_refused(numbers):
    with pytest.raises(ValueError, match=r"Expected finite|reversed"):
        estimate_text(*numbers, 10)


# Prose in the notebooks for Colab


def shown_by(captured) -> list[str]:
    return [o.data["text/markdown"] for o in captured.outputs if "text/markdown" in o.data]


def test_text_is_shown_with_the_values_that_were_glued(shell):
    with capture_output() as captured:
        glue("share", 0.625)
        glue("word", "sharper")
        notebook.show_text("It is {glue:text}`word` by {glue:text}`share:.1%`, $x_{1}$.")
    assert shown_by(captured) == ["It is sharper by 62.5%, $x_{1}$."]


def test_text_that_comes_before_its_values_is_shown_in_full_once_they_are_known(shell):
    text = "{glue:text}`first_of_two` and {glue:text}`second_of_two`."
    with capture_output() as captured:
        notebook.show_text(text)
        glue("first_of_two", 1)
    (early,) = shown_by(captured)
    assert early.startswith("… and ….") and "further down" in early
    with capture_output() as captured:
        glue("second_of_two", 2)
        glue("second_of_two", 3)
    assert shown_by(captured) == ["1 and 2."]


def test_cell_run_twice_before_its_values_are_known_is_completed_once(shell):
    with capture_output() as captured:
        notebook.show_text("{glue:text}`later_value`!")
        notebook.show_text("{glue:text}`later_value`!")
        glue("later_value", 7)
    assert shown_by(captured)[2:] == ["7!"]


# Records


def test_recorded_rows_come_back_unchanged(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(notebook, "records_file", lambda claim: tmp_path / f"{claim}.json")
    records = pd.DataFrame([one_record(), one_record(untrained=True, verdict="not supported")])
    with capture_output() as captured:
        record(records)
    hidden, shown = captured.outputs
    name, data = glued(hidden)
    assert name == notebook.RECORDS_KEY
    assert json.loads(data["application/papermill.record/text/plain"]) == records.to_dict("records")
    monkeypatch.setattr(results, "records_file", lambda claim: tmp_path / f"{claim}.json")
    pd.testing.assert_frame_equal(read_records("phase-transition"), records)
    assert "not supported" in shown.data["text/html"]


def test_a_claim_that_has_not_run_has_no_records(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "records_file", lambda claim: tmp_path / f"{claim}.json")
    assert read_records("norm-code") is None


def test_missing_numbers_become_null_where_nothing_could_be_tested():
    untestable = one_record(estimate=np.nan, ci_low=None, ci_high=pd.NA, verdict="not testable")
    (row,) = to_rows(pd.DataFrame([untestable]))
    assert [row["estimate"], row["ci_low"], row["ci_high"]] == [None, None, None]
    assert json.loads(to_json([row])) == [row]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "proved"}, "none of 'supported', 'not supported', 'not testable'"),
        ({"estimate": np.nan}, "needs an estimate"),
        ({"estimate": np.inf}, "infinite"),
        ({"untrained": "no"}, "untrained"),
        ({"n": 3.5}, "whole number"),
    ],
)
def test_record_that_means_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        to_rows(pd.DataFrame([one_record(**changes)]))


def test_records_of_two_claims_or_with_a_column_missing_are_refused():
    with pytest.raises(ValueError, match="one claim"):
        to_rows(pd.DataFrame([one_record(), one_record(claim="norm-code")]))
    with pytest.raises(ValueError, match="lack the columns n"):
        to_rows(pd.DataFrame([one_record()]).drop(columns="n"))
    with pytest.raises(ValueError, match="recorded twice"):
        to_rows(pd.DataFrame([one_record(), one_record(estimate=0.2)]))


def test_table_says_verdicts_in_words_and_escapes_what_it_shows():
    html = table_html(pd.DataFrame({"criterion": ["a < b"], "value": [0.12345]}), "Made & shown")
    assert "a &lt; b" in html
    assert ">0.12<" in html
    assert "<caption>Made &amp; shown</caption>" in html
    assert 'scope="col"' in html
    assert 'tabindex="0"' in html


# Setup


def run_setup_cell(folder: Path, before: str = "", **environment: str) -> str:
    cell = notebook.SETUP_CELL.replace("{repository}", "https://example.org/owner/project")
    code = f"{before}\n{cell.replace('{revision}', 'main')}\nprint(notebook.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_setup_cell_finds_the_project_from_a_folder_inside_it():
    assert run_setup_cell(ROOT / "book") == str(ROOT / "lib" / "notebook.py")


def test_setup_cell_clones_the_project_on_colab_and_works_twice(tmp_path):
    origin, home = tmp_path / "origin", tmp_path / "home"
    home.mkdir()
    (origin / "lib").mkdir(parents=True)
    for file in (ROOT / "lib").glob("*.py"):
        (origin / "lib" / file.name).write_bytes(file.read_bytes())
    (origin / "requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], check=True)
    colab = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')"
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://example.org/owner/project",
    }
    expected = str(home / "project" / "lib" / "notebook.py")
    assert run_setup_cell(home, colab, **redirect) == expected
    assert run_setup_cell(home, colab) == expected  # nothing is cloned again
    twice = notebook.SETUP_CELL.replace("{repository}", "https://example.org/owner/project")
    count = "assert sys.path.count(str(root)) == 1"
    assert run_setup_cell(home, f"{colab}\n{twice}\n{twice}\n{count}") == expected
    downloads = tmp_path / "downloads"  # a notebook that was downloaded, in Jupyter
    downloads.mkdir()
    assert run_setup_cell(downloads, **redirect).startswith(str(downloads / "project"))


def test_colab_installs_only_what_is_missing_and_never_numpy_or_torch(monkeypatch):
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(notebook.subprocess, "run", run)
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    notebook.prepare()
    (command,) = commands
    assert "--no-deps" in command
    pins = [argument for argument in command if "==" in argument]
    assert sorted(pin.split("==")[0] for pin in pins) == ["gguf", "scikit-dimension"]
    monkeypatch.setattr(notebook, "find_spec", lambda name: object())
    notebook.prepare()
    assert len(commands) == 1


def test_failed_installation_on_colab_says_what_pip_said(monkeypatch):
    failure = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(notebook.subprocess, "run", lambda *arguments, **options: failure)
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"Could not install gguf==.*no network"):
        notebook.prepare()


def test_chapters_ask_for_the_embedded_model_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    assert notebook.model_name() == "embedded"
    monkeypatch.setenv("MODEL", "some/model")
    assert notebook.model_name() == "some/model"


# Progress


def test_build_gets_progress_in_a_file_and_nothing_on_the_streams(tmp_path, monkeypatch, capfd):
    file = tmp_path / "progress"
    monkeypatch.setenv(PROGRESS_FILE, str(file))
    monkeypatch.setenv(PROGRESS_CHAPTER, "phase-transition")
    assert list(track(range(3), "sweep")) == [0, 1, 2]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] | {"seconds": 0} == {
        "chapter": "phase-transition",
        "what": "sweep",
        "done": 0,
        "total": 3,
        "seconds": 0,
    }
    assert lines[-1]["done"] == 3
    assert capfd.readouterr() == ("", "")


def test_progress_without_a_known_length_still_yields_everything(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    assert list(track(iter("abc"), "letters", chapter="x")) == ["a", "b", "c"]
    last = json.loads((tmp_path / "progress").read_text().splitlines()[-1])
    assert (last["chapter"], last["done"], last["total"]) == ("x", 3, None)


def test_progress_that_cannot_be_written_does_not_end_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "no such folder" / "progress"))
    assert list(track([1, 2], "sweep")) == [1, 2]


def test_progress_is_silent_where_nobody_watches(monkeypatch, capfd):
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    assert list(track([1, 2], "sweep")) == [1, 2]
    assert capfd.readouterr() == ("", "")
