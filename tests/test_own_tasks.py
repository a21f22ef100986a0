"""A reader's own tasks are checked, measured and judged as the book's, and change none of its."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from claimed import invented, number

from executable_book import freshness
from lib.claims import causal_control, inside_the_switch, phase_transition
from lib.engine.files import ROOT
from lib.evidence import own_tasks as module
from lib.evidence import records, transition, verify
from lib.evidence.content import other_task
from lib.evidence.criteria import claim_verdict, judge
from lib.evidence.own_tasks import contents, own_tasks
from lib.evidence.records import read_records, shown
from lib.evidence.steering import Steering
from lib.evidence.tasks import Task, load_tasks
from lib.evidence.transfer import choose_pairs, measure_transfer, read_tasks
from lib.reading.figures import book_rows
from lib.reading.words import size_text
from lib.science.estimate import (
    Estimate,
    Untested,
    mean_over_units,
    of_the_book,
    pool,
    share_limits,
)

CHAPTERS = sorted(
    file for file in (ROOT / "book").glob("*.md") if "load_tasks(" in file.read_text()
)
ITEMS = [("kin", f"w{10 + k}", f"w{40 + k % 3}") for k in range(14)]
TEXTS = [("kin", "of {subject} comes"), ("kin", "the word {subject} has then")]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write the two files and return the first one's path, which TASKS names."""

    def write(
        items=ITEMS,
        texts=TEXTS,
        columns=("task", "subject", "answer"),
        text_columns=("task", "text"),
    ) -> Path:
        file = tmp_path / "mine.csv"
        pd.DataFrame(items, columns=list(columns)).to_csv(file, index=False)
        table = pd.DataFrame(texts, columns=list(text_columns))
        table.to_csv(tmp_path / "mine-templates.csv", index=False)
        return file

    monkeypatch.delenv("TEMPLATES", raising=False)
    monkeypatch.setenv("TASKS", str(tmp_path / "mine.csv"))
    return write


def test_two_files_go_from_loading_to_verdicts_as_the_books_tasks_do(files, reader):
    files()
    task = load_tasks(reader, ["own: kin"], own=own_tasks())["own: kin"]
    assert isinstance(task, Task)
    assert (task.n_units, task.n_prompts, len(task.answers)) == (14, 28, 3)
    (trial,) = read_tasks(reader, {task.name: task}).values()
    measured = measure_transfer(trial, choose_pairs(trial), "last").estimate()
    assert isinstance(measured, Estimate) and measured.n_units == 14
    assert measured.value[-1] == pytest.approx(1, abs=1e-4)  # the last state is the prediction
    measured = measured.at(-2)
    book = {"animals": number(0.1, "subjects of animals"), "capitals": Untested("too few")}
    names = ("attention_transfer", "three_heads", "three_heads_held_out")
    alone = judge("inside-the-switch", "m", dict.fromkeys(names, book))
    both = judge("inside-the-switch", "m", dict.fromkeys(names, book | {task.name: measured}))
    own = [row for row in both if row["place"] == "own: kin"]
    assert [row["statistic"] for row in own] == list(names)
    assert {(row["verdict"], row["n"]) for row in own} == {("supported", 14)}, own
    assert [row for row in both if row not in own] == alone
    assert claim_verdict(both, "inside-the-switch", "m").verdict == "refuted"


def test_one_own_task_that_refutes_leaves_the_pooled_verdict_alone():
    names = ("attention_transfer", "three_heads", "three_heads_held_out")
    found = {"animals": number(0.9, "a"), "own: x": number(0.0, "x"), "own: y": number(0.0, "y")}
    rows = judge("inside-the-switch", "m", dict.fromkeys(names, found))
    assert {row["verdict"] for row in rows if row["place"] == "all tasks"} == {"supported"}
    assert {row["verdict"] for row in rows if row["place"] == "own: x"} == {"refuted"}


def test_no_number_over_the_books_tasks_changes_with_a_readers_own(monkeypatch, tmp_path, llama):
    book = {name: number(value, name) for name, value in (("a", 1.0), ("b", 2.0), ("c", 2.5))}
    more = {**book, "own: a": number(9.0, "own"), "own: b": Untested("flat")}
    assert np.array_equal(pool(more).draws, pool(book).draws)
    assert of_the_book(more) == book
    both = [phase_transition.transition_spread(one, 10) for one in (book, more)]
    assert np.array_equal(both[0].draws, both[1].draws)
    names = [f"own: {k}" for k in range(40)]
    others = [other_task("a", ["a", "b", "c", *own]) for own in ((), names)]
    assert others[0] == others[1]
    seen = ["capitals", "animals", "plurals", "cities", "antonyms", "emotions"]
    assert inside_the_switch.twin_tasks([*seen, *names]) == inside_the_switch.twin_tasks(seen)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    rows = shown(transition.CLAIM, llama.name, transition.STATISTIC, more)
    records.write_records(records.claim_file(transition.CLAIM), rows)
    assert transition.transition_block(llama) == pytest.approx(2.0)
    table = pd.DataFrame({"task": list(more), "block": range(5)})
    assert list(book_rows(table)["task"]) == ["a", "b", "c"]
    assert list(book_rows(table[:0]).columns) == ["task", "block"]


def test_a_readers_own_task_is_no_stranger_to_the_books(files, reader):
    kin = ITEMS + [("sib", f"w{24 + k}", f"w{50 + k % 3}") for k in range(14)]
    files(kin, [*TEXTS, *(("sib", text) for _, text in TEXTS)])
    tasks = load_tasks(reader, ["own: kin", "own: sib"], own=own_tasks())
    trials = list(read_tasks(reader, tasks).values())
    one, other = (object.__new__(Steering) for _ in trials)
    for steering, trial in zip((one, other), trials, strict=True):
        object.__setattr__(steering, "trial", trial)
    assert causal_control.find_stranger(one, {"a": one, "b": other}) is other
    found = causal_control.find_stranger(one, {"a": one, "own: sib": other})
    assert isinstance(found, Untested)


def changed(row: int, **cells: str) -> list[tuple[str, ...]]:
    names = ("task", "subject", "answer")
    rows = [dict(zip(names, item, strict=True)) for item in ITEMS]
    rows[row] |= cells
    return [tuple(one.values()) for one in rows]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"items": [("capitals", *item[1:]) for item in ITEMS]}, "'capitals': the book has a task"),
        ({"columns": ("task", "subject", "reply")}, "mine.csv lacks the columns answer; it needs"),
        ({"columns": ("title", "subject", "answer")}, "mine.csv lacks the columns task; it needs"),
        ({"columns": ("task", "word", "answer")}, "mine.csv lacks the columns subject; it needs"),
        ({"text_columns": ("title", "text")}, "mine-templates.csv lacks the columns task; it"),
        ({"text_columns": ("task", "words")}, "mine-templates.csv lacks the columns text; it"),
        ({"items": ITEMS[:1]}, "'kin': it has one subject, so nothing can be exchanged"),
        ({"items": [*ITEMS, ("kin", "w10", "w41")]}, "subject 'w10' has several answers"),
        ({"items": changed(3, answer=" ")}, "mine.csv has no rows or an empty cell"),
        ({"items": []}, "mine.csv has no rows or an empty cell"),
        ({"texts": TEXTS[:1]}, "'kin': it has one wording, and vectors are fitted on the others"),
        ({"texts": [*TEXTS, ("kin", "of comes")]}, "'of comes' needs {subject} once, after a"),
        ({"texts": [*TEXTS, ("kin", "of comes")]}, "Task 'kin': the template"),
        ({"texts": [*TEXTS, ("kin", "of {subject}")]}, "nor end with {subject}"),
        ({"texts": [*TEXTS, ("kim", "of {subject} comes")]}, "'kim': it is in one of mine.csv and"),
        ({"items": [*ITEMS, ("sib", "w1", "w2")]}, "'sib': it is in one of mine.csv and"),
    ],
)
def test_what_is_wrong_with_the_files_is_said_in_one_line(files, given, message):
    files(**given)
    with pytest.raises(ValueError) as error:
        own_tasks()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_csv_is_named(files, tmp_path):
    with pytest.raises(ValueError, match=r"no file mine\.csv"):
        own_tasks()
    file = files()
    (tmp_path / "mine-templates.csv").rename(tmp_path / "words.csv")
    with pytest.raises(ValueError, match=r"no file mine-templates\.csv"):
        own_tasks()
    assert own_tasks(file, tmp_path / "words.csv") is not None
    for content, reason in (
        (b"", "No columns to parse from file"),
        (b"task,subject,answer\na,b,c\na,b,c,d,e\n", "Expected 3 fields in line 3, saw 5"),
        ("für".encode("latin-1"), "can't decode byte 0xfc"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^mine\.csv is no CSV in UTF-8\. .*{reason}.*\)$"):
            own_tasks(file, tmp_path / "words.csv")


def test_two_subjects_are_a_task_and_groups_are_kept(files):
    """Whether two are enough is said where the task is judged."""
    items = [("kin", "w10", "w40", " one "), ("kin", "w11", "w41", "two")]
    texts = [("kin", "add {group} of {subject} comes"), ("kin", "of {subject} add {group} has")]
    files(items, texts, columns=("task", "subject", "answer", "group"))
    tasks, _ = own_tasks()
    assert tasks["group"].tolist() == ["one", "two"]


def test_both_files_count_in_the_keys_of_the_build(files):
    files()
    first = contents()
    files(texts=TEXTS[:1])
    second = contents()
    files(items=ITEMS[:3], texts=TEXTS[:1])
    assert len({first, second, contents(), b""}) == 4


def test_too_few_subjects_and_answers_of_one_first_token_are_not_testable_with_the_reason(
    files, reader
):
    two = [(task, subject, f"w40 {answer}") for task, subject, answer in ITEMS]
    for items, reason in ((ITEMS[:9], "9 usable subjects, 10 are"), (two, "share their first")):
        files(items)
        found = load_tasks(reader, ["own: kin"], own=own_tasks())["own: kin"]
        assert isinstance(found, Untested) and reason in found.reason


def test_cells_are_trimmed_and_columns_beyond_those_needed_do_no_harm(files):
    items = [(f" {task}", f"{subject} ", answer, "why") for task, subject, answer in ITEMS]
    files(items, columns=("task", "subject", "answer", "note"))
    trimmed, texts = own_tasks()
    assert set(trimmed["task"]) == set(texts["task"]) == {"own: kin"}
    assert list(trimmed["subject"]) == [subject for _, subject, _ in ITEMS]
    assert set(trimmed["group"]) == {""}


def test_the_name_of_a_wordings_task_is_trimmed(files):
    files(texts=[(f" {task} ", text) for task, text in TEXTS])
    _, texts = own_tasks()
    assert set(texts["task"]) == {"own: kin"}


def test_without_a_file_named_there_are_no_own_tasks(monkeypatch):
    monkeypatch.setenv("TASKS", "")
    assert own_tasks() is None and contents() == b""


def test_the_environment_names_files_of_the_projects_folder(files, monkeypatch, tmp_path):
    files()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("TASKS", "mine.csv")
    assert own_tasks() is not None
    (tmp_path / "mine-templates.csv").rename(tmp_path / "words.csv")
    monkeypatch.setenv("TEMPLATES", "words.csv")
    assert own_tasks() is not None


def test_a_file_is_found_from_a_notebooks_folder_and_from_the_projects(
    files, monkeypatch, tmp_path
):
    files()
    monkeypatch.setenv("TASKS", "")
    (tmp_path / "book").mkdir()
    for root, here in ((tmp_path, tmp_path / "book"), (tmp_path / "book", tmp_path)):
        monkeypatch.setattr(module, "ROOT", root)
        monkeypatch.chdir(here)
        assert own_tasks("mine.csv") is not None
        assert own_tasks("mine.csv", "mine-templates.csv") is not None


def test_the_check_before_the_build_ends_it_with_one_line():
    environment = {**os.environ, "TASKS": "no-such.csv"}
    command = [sys.executable, "-m", "lib.evidence.own_tasks"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no file no-such.csv; give a CSV with")
    assert done.stderr.count("\n") == 1
    asked = ["make", "--dry-run", "book", "TASKS=a.csv"]
    steps = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert steps.index("lib.evidence.own_tasks") < steps.index("jupyter-book build")
    plain = subprocess.run(asked[:3], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "own_tasks" not in plain


def test_a_task_shows_what_its_size_can_tell_of_a_share():
    for n in (12, 40, 90):
        half, least = share_limits(n)
        found = mean_over_units(np.arange(n) % 2, "subjects", share=True).interval()
        assert float(found.high - found.low) / 2 == pytest.approx(half, abs=0.03)
        assert least == pytest.approx(
            float(mean_over_units([1] * n, "s", share=True).interval().low)
        )
    assert size_text("capitals", 65) == "65"
    assert size_text("own: kin", 40) == (
        "40 (a share of them: ±0.16 at one half, 0.91 or more if all agree)"
    )


def test_runs_that_are_compared_leave_own_tasks_out(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    rows = invented("why-angles")
    records.keep_records([*rows, rows[0] | {"place": "own: kin"}])
    assert read_records(records.run_folder("m") / "results.json") == rows


def test_verification_says_in_one_line_that_own_tasks_have_no_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(verify, "pages", lambda: ["book/why-angles"])
    rows = invented("why-angles")
    records.write_records(verify.recorded_file("m"), rows)
    own = [row | {"place": "own: kin"} for row in rows]
    records.write_records(records.results_file(), [*rows, *own])
    line = "Not compared, for a reader's own tasks have no record: own: kin."
    for arguments in ([], ["--update"]):
        assert verify.main(arguments) == 0
        assert capsys.readouterr().out.count(line) == 1
    assert read_records(verify.recorded_file("m")) == rows


def test_facts_of_a_build_name_the_readers_own_tasks(files):
    assert records.run_facts()["own_tasks"] == os.environ["TASKS"]


def test_chapters_run_again_when_own_tasks_change_and_go_back_without_them(files, monkeypatch):
    page = f"book/{CHAPTERS[0].stem}"
    monkeypatch.delenv("TASKS")
    default, other = (freshness.chapter_digest(name) for name in (page, "book/why-angles"))
    file = files()
    monkeypatch.setenv("TASKS", str(file))
    first = freshness.chapter_digest(page)
    files(ITEMS[1:])
    second = freshness.chapter_digest(page)
    files(texts=TEXTS[::-1])
    third = freshness.chapter_digest(page)
    assert len({default, first, second, third}) == 4
    assert freshness.chapter_digest("book/why-angles") == other
    monkeypatch.delenv("TASKS")
    assert freshness.chapter_digest(page) == default


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda file: file.stem)
def test_every_chapter_with_tasks_takes_a_readers_own(chapter):
    text = chapter.read_text(encoding="utf-8")
    assert "\nOWN_TASKS = own_tasks()" in text
    assert text.count("load_tasks(") == text.count("own=OWN_TASKS)") > 0
    assert text.index("OWN_TASKS = own_tasks()") < text.index("load_decoder(MODEL)")
