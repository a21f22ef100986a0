import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from claimed import TASKS, invented, number
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from lib.engine.progress import PROGRESS_CHAPTER, PROGRESS_FILE, track
from lib.evidence import records
from lib.evidence.records import shown
from lib.reading import notebook
from lib.reading.figures import forest
from lib.reading.notebook import answer_table, conclude, glue, table_html, verdict_table
from lib.reading.words import estimate_text
from lib.science.estimate import Estimate, Untested

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    yield InteractiveShell.instance(history_length=0)
    InteractiveShell.clear_instance()


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
    code = "import sys; sys.modules['myst_nb'] = None\n"
    code += "from lib.reading.notebook import glue; glue('a', 1)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def estimate_of(value: float, half_width: float) -> Estimate:
    """Return an estimate whose percentile interval is value ± half_width."""
    draws = value + half_width / 0.95 * np.linspace(-1, 1, 4001)
    return Estimate(np.concatenate([[value], draws]), "texts", 10**6)


def test_estimate_reads_as_prose_quotes_it():
    assert estimate_text(estimate_of(0.62, 0.06)) == "0.62 [0.56, 0.68]"
    assert estimate_text(Untested("accuracy 0.31, 0.8 is needed")) == (
        "not testable (accuracy 0.31, 0.8 is needed)"
    )


def test_small_and_negative_numbers_do_not_become_zero_or_hyphens():
    assert estimate_text(estimate_of(0.0004, 0.2)) == "0.0004 [\u22120.20, 0.20]"
    assert estimate_text(estimate_of(0.00003, 0.00004)) == "0.00003 [\u22120.00001, 0.00007]"


def test_an_estimate_of_several_numbers_is_refused():
    many = Estimate(np.zeros((3, 4)), "texts", 5)
    with pytest.raises(ValueError, match="over texts holds 4 numbers"):
        estimate_text(many)


def test_estimates_are_glued_by_their_names(shell):
    with capture_output() as captured:
        notebook.glue_estimates({"late": estimate_of(0.5, 0.1), "none": Untested("too few")})
    assert [glued(output) for output in captured.outputs] == [
        ("late", {"application/papermill.record/text/plain": "'0.50 [0.40, 0.60]'"}),
        ("none", {"application/papermill.record/text/plain": "'not testable (too few)'"}),
    ]


def test_a_glued_figure_is_carried_as_a_picture_and_not_shown(shell):
    open_before = plt.get_fignums()
    with capture_output() as captured:
        notebook.glue_figure("main", plt.figure())
    (output,) = captured.outputs
    name, data = glued(output)
    assert name == "main"
    assert set(data) == {
        f"application/papermill.record/{kind}" for kind in ("image/png", "text/plain")
    }
    assert data["application/papermill.record/image/png"].startswith("iVBORw0KGgo")
    assert plt.get_fignums() == open_before


def test_where_prose_pastes_nothing_the_figure_is_shown_once_it_is_there(shell):
    with capture_output() as captured:
        notebook.show_glued("later")
        notebook.glue_figure("later", plt.figure())
        notebook.show_glued("later")
    note, carried, first, second = captured.outputs
    assert "further down" in note.data["text/markdown"]
    assert glued(carried)[0] == "later"
    assert "image/png" in first.data and first.data == second.data


def test_the_answer_says_over_how_many_tasks_a_number_is_pooled():
    rows = invented("angular-code")  # three tasks that were measured, one that was not
    names = list(answer_table(rows, "angular-code")["statistic"])
    assert {"late correlation, 3 tasks", "late correlation, texts"} <= set(names)


def test_the_answer_says_why_a_number_that_passes_stays_undecided():
    rows = invented("inside-the-switch")
    row = next(one for one in rows if one["place"] == "all tasks" and not one["untrained"])
    row |= {"verdict": "undecided", "reason": "5 of 16 tasks refute it"}
    first, *others = answer_table(rows, "inside-the-switch")["verdict"]
    assert first == "◐ undecided (5 of 16 tasks refute it)"
    assert all(one == "● supported" for one in others)


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


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    rows = invented("angular-code", twins_met=True)
    return rows + shown("angular-code", "m", "gap", {"capitals": number(22.5, "subjects")})


def test_conclude_writes_records_and_glues_each_by_its_name(shell, rows):
    with capture_output() as captured:
        conclude(rows)
    assert records.read_records(records.claim_file("angular-code")) == rows
    named = {
        output.metadata["scrapbook"]["name"]: output.data
        for output in captured.outputs
        if "scrapbook" in output.metadata
    }
    plain = "application/papermill.record/text/plain"
    assert json.loads(named["records"][plain]) == rows
    told = {name: data[plain].strip("'") for name, data in named.items()}
    row = next(r for r in rows if (r["statistic"], r["place"]) == ("late_correlation", "texts"))
    number_, low, high = (f"{row[field]:.2f}" for field in ("estimate", "low", "high"))
    assert told["late_correlation.texts"] == f"{number_} [{low}, {high}]"
    assert told["late_correlation.texts.verdict"] == "supported"
    assert told["late_correlation.all-tasks.n"] == "120"
    assert told["late_correlation.continents"] == "not testable (accuracy 0.31, 0.8 is needed)"
    assert told["late_correlation.texts.twins.verdict"] == "supported"
    assert told["gap.capitals"].startswith("22.50 [")
    assert told["verdict"] == "supported"
    assert told["sets-in-at-the-switch.verdict"] == "supported"
    assert "<table>" in named["answer"]["application/papermill.record/text/html"]


def test_conclude_shows_the_table_and_the_forest(shell, rows):
    with capture_output() as captured:
        conclude(rows)
    outputs = [output.data for output in captured.outputs if "scrapbook" not in output.metadata]
    assert "● supported, architecture" in outputs[-2]["text/html"]
    assert "image/png" in outputs[-1]


def test_conclude_takes_one_claim_on_one_model(shell, rows):
    for others in (invented("why-angles"), invented("angular-code", "other")):
        with pytest.raises(ValueError, match="records of one claim on one model"):
            conclude([*rows, *others])
    with pytest.raises(ValueError, match="got none"):
        conclude([])


def test_answer_has_a_row_for_each_judged_number_beside_its_twins(rows):
    table = answer_table(rows, "angular-code")
    assert table["part"].drop_duplicates().tolist() == [
        "strength",
        "sets in at the switch",
        "angle, not distance",
        "beyond a fair reader",
    ]
    assert len(table) == 12 and not table["statistic"].str.contains("capitals").any()
    first = table.iloc[0]
    assert first["criterion"] == "≥ 0.4"
    assert first["trained"] == first["untrained twins"]
    assert first["verdict"] == "● supported, architecture"
    compared = table[table["untrained twins"] == "compared"]
    assert compared["verdict"].tolist() == ["● supported"] * 3


def test_all_records_stand_in_the_table_the_judged_ones_first(rows):
    table = verdict_table(rows)
    assert len(table) == len(rows)
    judged = table["place"].isin(["texts", "all tasks", "model"]) & (table["model"] == "m")
    assert judged.tolist() == sorted(judged, reverse=True)
    assert "capitals (seen)" in set(table["place"]) and TASKS[2] in set(table["place"])
    assert "– not testable" in set(table["verdict"])


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
    assert run_setup_cell(ROOT / "book") == str(ROOT / "lib" / "reading" / "notebook.py")


def test_setup_cell_clones_the_project_on_colab_and_works_twice(tmp_path):
    origin, home = tmp_path / "origin", tmp_path / "home"
    home.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.csv")
    shutil.copytree(ROOT / "lib", origin / "lib", ignore=ignored)
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
    expected = str(home / "project" / "lib" / "reading" / "notebook.py")
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
    assert sorted(pin.split("==")[0] for pin in pins) == ["gguf"]
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


def test_a_models_folder_is_named_from_the_projects_on_wherever_a_chapter_is_executed(
    monkeypatch, tmp_path
):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "book").mkdir()
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path / "book")
    for name in ("models/mine", str(tmp_path / "models" / "mine")):
        monkeypatch.setenv("MODEL", name)
        assert notebook.model_name() == str(tmp_path / "models" / "mine")


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
    monkeypatch.delenv(PROGRESS_CHAPTER, raising=False)
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]
    last = json.loads((tmp_path / "progress").read_text().splitlines()[-1])
    assert (last["chapter"], last["done"], last["total"]) == ("", 3, None)


def test_progress_that_cannot_be_written_does_not_end_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "no such folder" / "progress"))
    assert list(track([1, 2], "sweep")) == [1, 2]


def test_progress_is_silent_where_nobody_watches(monkeypatch, capfd):
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    assert list(track([1, 2], "sweep")) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_a_forest_leaves_out_curves_and_numbers_that_no_task_has(rows):
    one = number(0.3, "forty")
    claim, model = rows[0]["claim"], rows[0]["model"]
    by_block = shown(claim, model, "a curve", {f"block {b}": one for b in range(5)})
    alone = shown(claim, model, "a mean", {"all tasks": one})
    by_task = shown(claim, model, "a place", {"capitals": one, "antonyms": one})
    figure = forest([*rows, *by_block, *alone, *by_task])
    titles = {axes.get_title(loc="left") for axes in figure.axes}
    assert "a place" in titles and not titles & {"a curve", "a mean"}
    plt.close(figure)
