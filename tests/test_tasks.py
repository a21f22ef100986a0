import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_model, tiny_tokenizer

from lib.engine.files import DATA
from lib.engine.models import Decoder, load_decoder
from lib.evidence.tasks import (
    BOOK,
    ITEM_COLUMNS,
    KEPT_BACK,
    TEMPLATE_COLUMNS,
    Task,
    build_task,
    exchange_pairs,
    few_subjects,
    load_tasks,
    load_texts,
    read_csv,
)
from lib.science.estimate import Untested

TEMPLATES = ["of {subject} comes", "the word {subject} has then"]


def items(n: int = 14, n_answers: int = 3, **changed) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "subject": [f"w{10 + k}" for k in range(n)],
            "answer": [f"w{40 + k % n_answers}" for k in range(n)],
            "group": "",
        }
    )
    return table.assign(**changed)


@pytest.fixture(scope="module")
def reader() -> Decoder:
    words = [
        "?",
        *(f"w{k}" for k in range(1, 55)),
        "of",
        "comes",
        "the",
        "word",
        "has",
        "then",
        "add",
    ]
    words += ["one", "two"]
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer(words[:64]))


@pytest.fixture(scope="module")
def task(reader: Decoder) -> Task:
    found = build_task("toy", items(), TEMPLATES, reader)
    assert isinstance(found, Task)
    return found


def test_every_subject_stands_in_every_template_at_the_place_that_is_named(task: Task):
    assert (task.n_units, task.n_prompts, len(task.answers)) == (14, 28, 3)
    for row in task.prompts.itertuples():
        assert row.text == TEMPLATES[row.template].replace("{subject}", row.subject)
        assert row.tokens[row.subject_position] == 10 + task.subjects.index(row.subject)
        assert task.subjects[row.unit] == row.subject
        assert task.answers[row.answer_index] == row.answer
    assert [f"w{i}" for i in task.answer_ids] == list(task.answers)


def test_a_subject_of_several_tokens_is_named_from_first_to_last(reader: Decoder):
    table = items()
    table.loc[0, "subject"] = "w1 w2 w3"
    found = build_task("toy", table, TEMPLATES, reader)
    row = found.prompts[found.prompts["subject"] == "w1 w2 w3"].iloc[0]
    assert (row["subject_start"], row["subject_position"]) == (1, 3)
    assert row["tokens"][1:4] == [1, 2, 3]


def test_pairs_share_template_and_differ_in_answer_and_every_subject_gives_as_it_takes(task: Task):
    pairs = exchange_pairs(task)
    recipient, donor = (task.prompts.iloc[pairs.prompts[:, k]] for k in (0, 1))
    assert (recipient["template"].to_numpy() == donor["template"].to_numpy()).all()
    assert (recipient["answer"].to_numpy() != donor["answer"].to_numpy()).all()
    assert np.array_equal(pairs.unit, recipient["unit"].to_numpy())
    assert (np.bincount(pairs.unit) == 3).all()
    assert (np.bincount(donor["unit"]) == 3).all()
    assert len({tuple(pair) for pair in pairs.prompts.tolist()}) == len(pairs)


@pytest.mark.parametrize(
    ("sizes", "distances"),
    [
        ([1] * 14, [4, 7, 10]),
        ([2] * 7, [4, 7, 10]),
        ([9, 3, 2], [4, 7, 10]),
        ([7, 7], [7, 7]),  # all at one distance: two wordings make two pairs of it
    ],
)
def test_donors_stand_evenly_on_a_circle_sorted_by_answer(
    reader: Decoder, sizes: list[int], distances: list[int]
):
    """From the nearest to the farthest distance at which no subject meets its own answer."""
    circle = [answer for answer, size in enumerate(sizes) for _ in range(size)]
    found = build_task("toy", items(answer=[f"w{40 + k}" for k in circle]), TEMPLATES, reader)
    pairs = exchange_pairs(found).prompts
    expected = [(a, circle[(k + step) % 14]) for step in distances for k, a in enumerate(circle)]
    met = Counter(zip(*found.answer_index[pairs].T.tolist(), strict=True))
    assert met == Counter((a, b) for a, b in expected if a != b)


def test_an_answer_of_most_subjects_is_never_exchanged_for_itself(reader: Decoder):
    """Where no distance on the circle avoids it, a subject goes without that donor."""
    common = ["w40"] * 9 + ["w41"] * 3 + ["w42"] * 2
    found = build_task("toy", items(answer=common), TEMPLATES, reader)
    pairs = exchange_pairs(found)
    recipient, donor = found.answer_index[pairs.prompts].T
    assert (recipient != donor).all()
    assert 0 < len(pairs) < 3 * 14


def test_thinned_pairs_are_spread_from_the_first_to_the_last(task: Task):
    pairs = exchange_pairs(task)
    few = pairs.thin(4)
    rows = [round(k * (len(pairs) - 1) / 3) for k in range(4)]
    assert (few.prompts == pairs.prompts[rows]).all() and (few.unit == pairs.unit[rows]).all()
    assert len(pairs.thin(10**6)) == len(pairs)


def test_pairs_follow_from_the_tasks_name_alone(reader: Decoder, task: Task):
    again = build_task("toy", items(), TEMPLATES, reader)
    other = build_task("other", items(), TEMPLATES, reader)
    assert np.array_equal(exchange_pairs(task).prompts, exchange_pairs(again).prompts)
    assert not np.array_equal(exchange_pairs(task).prompts, exchange_pairs(other).prompts)


def test_donors_of_one_number_are_the_first_of_more_subjects_spread_over_templates(task: Task):
    template = task.prompts["template"].to_numpy()[exchange_pairs(task).prompts[:, 0]]
    assert abs(int((template == 0).sum()) - int((template == 1).sum())) <= 2


def test_groups_are_kept_apart_and_can_be_chosen(reader: Decoder):
    table = pd.concat([items(12, 12, group="one"), items(12, 12, group="two")], ignore_index=True)
    table.loc[12:, "answer"] = np.roll(table["answer"][12:], 1)
    task = build_task(
        "sum", table, ["add {group} of {subject} comes", "of {subject} add {group}"], reader
    )
    pairs = exchange_pairs(task)
    group = task.prompts["group"].to_numpy()
    assert (group[pairs.prompts[:, 0]] == group[pairs.prompts[:, 1]]).all()
    assert set(group[pairs.prompts[:, 0]]) == {"one", "two"}
    assert (np.bincount(pairs.unit) == 3).all()  # as many as without groups
    chosen = exchange_pairs(task, groups=["two"])
    assert set(group[chosen.prompts.ravel()]) == {"two"}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (items(9), "9 usable subjects, 10 are needed"),
        (items(14, 1), "every subject has the answer 'w40'"),
        (
            items(answer=["w40 w41", "w40 w42"] * 7),
            "'w40 w41' and 'w40 w42' share their first token",
        ),
    ],
)
def test_a_task_that_cannot_be_judged_says_why(reader: Decoder, table: pd.DataFrame, reason: str):
    found = build_task("toy", table, TEMPLATES, reader)
    assert isinstance(found, Untested)
    assert reason in found.reason


def test_subjects_whose_tokens_cannot_be_found_are_left_out_and_counted(embedded: Decoder):
    table = pd.DataFrame(
        {"subject": [f"{chr(97 + k)}" for k in range(12)], "answer": ["x", "y"] * 6, "group": ""}
    )
    found = build_task("glued", table, ["say {subject}ing now"], embedded)
    assert isinstance(found, Task | Untested)
    lone = build_task("short", table.iloc[:4], ["say {subject} now"], embedded)
    assert "4 usable subjects" in lone.reason


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("of comes", "needs {subject} once"),
        ("{subject} comes", "after a space"),
        ("of {subject}", "nor end with {subject}"),
        ("of {subject} comes ", "neither start or end with a space"),
        ("of {subject} {group} comes", "exactly when every item has a group"),
    ],
)
def test_a_bad_template_is_refused_in_one_line(reader: Decoder, template: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        build_task("toy", items(), [template], reader)
    assert "\n" not in str(error.value)


def test_an_unknown_task_and_missing_columns_are_refused_with_what_there_is(
    reader: Decoder, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"choose among .*capitals"):
        load_tasks(reader, ["capitols"])
    (tmp_path / "mine.csv").write_text("subject\nx\n")
    with pytest.raises(ValueError, match="lacks the columns task, answer, group"):
        read_csv(tmp_path / "mine.csv", ITEM_COLUMNS)
    with pytest.raises(ValueError, match=r"no file other\.csv"):
        read_csv(tmp_path / "other.csv", ITEM_COLUMNS)


def test_a_large_network_has_few_subjects_of_every_answer_and_a_small_one_has_all(
    embedded: Decoder, monkeypatch: pytest.MonkeyPatch
):
    whole = load_tasks(embedded)
    n_parameters = sum(weight.numel() for weight in embedded.model.parameters())
    monkeypatch.setattr("lib.evidence.tasks.LARGE", n_parameters + 1)
    assert {n: t.subjects for n, t in load_tasks(embedded).items() if isinstance(t, Task)} == {
        n: t.subjects for n, t in whole.items() if isinstance(t, Task)
    }
    monkeypatch.setattr("lib.evidence.tasks.LARGE", n_parameters)
    few = load_tasks(embedded)
    for name, task in whole.items():
        if not isinstance(task, Task):
            continue
        own = few[name]
        assert isinstance(own, Task)
        assert own.n_units <= 24
        assert set(own.subjects) <= set(task.subjects)
        assert own.prompts["template"].nunique() == task.prompts["template"].nunique()
        if task.n_units <= 24:
            assert own.subjects == task.subjects
        if len(task.answers) <= 6:  # none is so rare that it falls between two that are taken
            assert set(own.answers) == set(task.answers)
    assert few["capitals"].n_units >= 20


def test_few_subjects_are_spread_over_the_answers_whatever_their_order():
    answers = ["y" if row in (1, 2) else "x" for row in range(60)]  # rows 1, 2 fall between
    table = pd.DataFrame({"subject": [f"s{row}" for row in range(60)], "answer": answers})
    kept = few_subjects(pd.concat([table.assign(group="a"), table.assign(group="b")]))
    assert kept["subject"].nunique() == 24
    assert set(kept["answer"]) == {"x", "y"}
    assert (kept.groupby("subject")["group"].nunique() == 2).all()


def test_tasks_kept_back_are_new_and_of_many_subjects_to_an_answer(embedded: Decoder):
    items, templates = (read_csv(DATA / file, ("task",)) for file in KEPT_BACK)
    book = [read_csv(DATA / file, ("task",)) for file in BOOK]
    assert not set(items["task"]) & set(book[0]["task"])
    assert not set(items["subject"]) & set(book[0]["subject"])
    assert items["subject"].is_unique
    assert not set(templates["text"]) & set(book[1]["text"])
    for name, own in items.groupby("task"):
        texts = templates.loc[templates["task"] == name, "text"]
        assert len(own) == 40
        assert 2 <= own["answer"].nunique() <= 5
        assert own["answer"].value_counts().min() >= 8
        assert texts.nunique() == 3
        shown = set(re.findall(r"\w+", " ".join(texts).replace("{subject}", "")))
        assert not shown & set(own["subject"])
    tasks = load_tasks(embedded, files=KEPT_BACK)
    assert len(tasks) == 8
    assert all(isinstance(task, Task) and task.n_units == 40 for task in tasks.values())


def test_the_material_is_as_registered():
    tasks = read_csv(DATA / "tasks.csv", ITEM_COLUMNS)
    templates = read_csv(DATA / "templates.csv", TEMPLATE_COLUMNS)
    assert not tasks.duplicated(["task", "subject", "group"]).any()
    sizes = (
        tasks.groupby("task")["subject"]
        .nunique()
        .drop(["months-sequence", "months-arithmetic", "weekdays-sequence"])
    )
    assert len(sizes) >= 10
    assert sizes.between(40, 90).all()
    assert templates.groupby("task").size().between(2, 3).all()
    answers = tasks.groupby("task")["answer"].nunique().loc[sizes.index]
    assert (answers < sizes).sum() * 2 >= len(sizes)


def test_the_texts_for_verdicts_are_new_of_twelve_kinds_and_end_in_varied_tokens(embedded: Decoder):
    new, old = load_texts(), load_texts("contexts.csv")
    assert len(new) == 400
    assert new["kind"].nunique() == 12
    assert not set(new["context"]) & set(old["context"])
    last = [tokens[-1] for tokens in embedded.tokenizer(new["context"].tolist())["input_ids"]]
    assert np.unique(last, return_counts=True)[1].max() <= 20
    n_reader = sum(
        len(tokens) - 1 for tokens in embedded.tokenizer(old["context"].tolist())["input_ids"]
    )
    assert n_reader >= 3000
