"""Tasks: the data keep their promises, prompts line up, pairs are what they claim to be."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lib.evidence import tasks
from lib.evidence.tasks import build_task, gate, load_contexts, load_task, ordered_pairs, task_names

# fmt: off
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
           "twelve"]
WORDS = ["The", "capital", "of", "is", "In", "you", "visit", "France", "Italy", "Spain", "Paris",
         "Rome", "Madrid"]
# fmt: on
ITEMS = pd.DataFrame(
    [("France", "Paris", ""), ("Italy", "Rome", ""), ("Spain", "Madrid", "")],
    columns=["subject", "answer", "group"],
)
TEMPLATES = ["The capital of {subject} is", "In {subject} you visit"]


def word_decoder(words=WORDS, bos=False):
    """A decoder's stand-in whose tokenizer splits at spaces and hyphens: "New-York" is 3 tokens."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "-", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split("-", "isolated")])
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return SimpleNamespace(
        name="words", tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    )


def items(rows):
    return pd.DataFrame(rows, columns=["subject", "answer", "group"])


@pytest.fixture(scope="module")
def raw():
    return tasks._read("tasks.csv"), tasks._read("templates.csv")


# The data


def test_each_task_has_three_templates_with_the_subject_placed_inside(raw):
    rows, templates = raw
    assert set(rows["task"]) == set(templates["task"]) == set(task_names())
    assert len(task_names()) >= 8
    for name, texts in templates.groupby("task"):
        assert len(texts) >= 3
        assert texts["template"].tolist() == [str(index) for index in range(len(texts))]
        assert texts["text"].is_unique
        grouped = (rows.loc[rows["task"] == name, "group"] != "").any()
        for text in texts["text"]:
            assert text.count(" {subject}") == 1
            assert not text.endswith("{subject}")
            assert text == text.strip()
            assert text.count("{") == 1 + grouped
            assert (" {group}" in text) == grouped


def test_no_subject_stands_twice_in_a_task_or_group(raw):
    rows, _ = raw
    assert not rows.duplicated(["task", "group", "subject"]).any()
    assert (rows[["subject", "answer"]] != "").all(axis=None)
    assert not rows["subject"].str.contains(" ").any()
    assert set(rows.loc[rows["group"] != "", "task"]) == {"months-arithmetic"}


def test_many_to_one_tasks_give_every_subject_a_partner_of_the_same_answer(raw):
    rows, _ = raw
    shared = {
        name: Counter(cell["answer"])
        for name, cell in rows[rows["group"] == ""].groupby("task")
        if cell["answer"].duplicated().any()
    }
    assert set(shared) == {"continents", "languages", "animals"}
    assert all(min(counts.values()) >= 2 for counts in shared.values())
    for name in ("continents", "animals"):
        assert set(shared[name].values()) == {4}
        assert len(shared[name]) == 4


def test_months_arithmetic_is_144_correct_sums(raw):
    rows, _ = raw
    rows = rows[rows["task"] == "months-arithmetic"]
    expected = {
        (month, MONTHS[(start + amount) % 12], number)
        for start, month in enumerate(MONTHS)
        for amount, number in enumerate(NUMBERS, start=1)
    }
    assert len(rows) == len(expected) == 144
    assert set(rows[["subject", "answer", "group"]].itertuples(index=False, name=None)) == expected


def test_sequences_name_the_successor(raw):
    rows, _ = raw
    for name, cycle in (
        ("months-sequence", MONTHS),
        ("weekdays-sequence", DAYS),
        ("number-words", [*NUMBERS, "thirteen"]),
    ):
        cell = rows[rows["task"] == name]
        assert len(cell) == (12 if name == "number-words" else len(cycle))
        for subject, answer in zip(cell["subject"], cell["answer"], strict=True):
            assert answer == cycle[(cycle.index(subject) + 1) % len(cycle)]


def test_no_template_shows_a_subject_or_an_answer_of_its_task(raw):
    rows, templates = raw
    for name, text in zip(templates["task"], templates["text"], strict=True):
        cell = rows[rows["task"] == name]
        shown = set(text.replace(",", " ").replace(":", " ").replace(";", " ").split())
        assert not shown & (set(cell["subject"]) | set(cell["answer"])), text


# Building a task


def test_prompts_are_the_filled_templates_with_the_subject_where_it_is_said_to_be():
    decoder = word_decoder()
    task = build_task("capitals", ITEMS, TEMPLATES, decoder)
    assert task.prompts["text"].tolist() == [
        template.format(subject=subject) for template in TEMPLATES for subject in ITEMS["subject"]
    ]
    assert task.prompts["template"].tolist() == [0, 0, 0, 1, 1, 1]
    assert task.subject_positions.tolist() == [3, 3, 3, 1, 1, 1]
    assert task.answers == ("Paris", "Rome", "Madrid")
    assert decoder.tokenizer.convert_ids_to_tokens(task.answer_ids.tolist()) == list(task.answers)
    for row in task.prompts.itertuples():
        read = decoder.tokenizer.convert_ids_to_tokens(row.tokens)
        assert read == row.text.split()
        assert read[row.subject_position] == row.subject
        assert task.answers[row.answer_index] == row.answer


def test_a_bos_token_moves_the_subject_by_one():
    plain = build_task("capitals", ITEMS, TEMPLATES, word_decoder())
    with_bos = build_task("capitals", ITEMS, TEMPLATES, word_decoder(bos=True))
    assert (with_bos.subject_positions == plain.subject_positions + 1).all()
    assert [tokens[1:] for tokens in with_bos.tokens] == plain.tokens
    assert {tokens[0] for tokens in with_bos.tokens} == {1}
    assert (with_bos.answer_ids == plain.answer_ids).all()


def test_subject_is_found_where_the_same_word_stands_earlier():
    decoder = word_decoder([*WORDS, "and"])
    task = build_task("twice", ITEMS, ["In France and {subject} you visit"], decoder)
    assert task.subject_positions.tolist() == [3, 3, 3]


def test_unknown_task_lists_the_names():
    with pytest.raises(ValueError, match=r"Unknown task 'capitols'; choose one of: .*capitals"):
        load_task("capitols", word_decoder())


def test_a_subject_or_answer_of_several_tokens_is_refused_with_its_tokens_and_a_remedy():
    for column, word in (("subject", "Spain-Italy"), ("answer", "Rome-Paris")):
        rows = ITEMS.assign(**{column: [*ITEMS[column][:2], word]})
        with pytest.raises(ValueError, match=f"'t': {column} ' {word}' is 3 tokens") as refused:
            build_task("t", rows, TEMPLATES, word_decoder())
        first, last = word.split("-")
        assert f"('{first}', '-', '{last}')" in str(refused.value)
        assert "Drop it" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_items_of_several_tokens_are_left_out_on_request():
    rows = items(
        [("France", "Paris", ""), ("Italy-Spain", "Rome", ""), ("Italy", "Rome-Paris", ""),
         ("Spain", "Madrid", "")]
    )  # fmt: skip
    task = build_task("t", rows, TEMPLATES, word_decoder(), drop_multi_token=True)
    assert task.prompts["subject"].tolist() == ["France", "Spain"] * 2
    assert task.prompts.index.tolist() == [0, 1, 2, 3]
    assert task.answers == ("Paris", "Madrid")
    kept = build_task("t", rows.iloc[[0, 3]], TEMPLATES, word_decoder())
    assert task.tokens == kept.tokens
    assert task.answer_ids.tolist() == kept.answer_ids.tolist()


def test_an_answer_that_is_another_token_after_another_template_is_refused(monkeypatch):
    def read_rome_otherwise(decoder, texts):
        ids = [decoder.tokenizer(text)["input_ids"] for text in texts]
        rome, paris = decoder.tokenizer.convert_tokens_to_ids(["Rome", "Paris"])
        return [
            [paris if token == rome and text.startswith("In") else token for token in line]
            for text, line in zip(texts, ids, strict=True)
        ]

    monkeypatch.setattr(tasks, "tokenize", read_rome_otherwise)
    with pytest.raises(ValueError, match="answer ' Rome' is another token after 'In Italy you"):
        build_task("t", ITEMS, TEMPLATES, word_decoder())


def test_prompts_of_unequal_length_are_refused():
    rows = ITEMS.assign(group=["one", "one", "one two"])
    decoder = word_decoder([*WORDS, "one", "two"])
    with pytest.raises(ValueError, match=r"'t', template 0: .*5 tokens.*has 6; positions must"):
        build_task("t", rows, ["In {group} {subject} you visit"], decoder)


def test_a_subject_at_another_position_is_refused_at_equal_length():
    decoder = word_decoder()
    task = build_task("t", ITEMS, TEMPLATES, decoder)
    shifted = task.prompts.assign(subject_position=[3, 3, 2, 1, 1, 1])
    with pytest.raises(ValueError, match=r"template 0: .*3 tokens before the subject.*has 2"):
        tasks.Task("t", shifted, task.answers, task.answer_ids)


def test_one_item_or_one_answer_is_refused():
    with pytest.raises(ValueError, match="1 subject"):
        build_task("t", ITEMS[:1], TEMPLATES, word_decoder())
    with pytest.raises(ValueError, match="1 answer"):
        build_task("t", ITEMS.assign(answer="Rome"), TEMPLATES, word_decoder())


def test_answers_that_are_the_same_token_are_refused():
    decoder = word_decoder()
    with pytest.raises(ValueError, match="same token"):
        build_task("t", ITEMS.assign(answer=["Oslo", "Bern", "Rome"]), TEMPLATES, decoder)


def test_a_prompt_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="'The capital of France is' stands twice"):
        build_task("t", pd.concat([ITEMS, ITEMS[:1]]), TEMPLATES, word_decoder())


@pytest.mark.parametrize(
    "template",
    ["The capital is", "{subject} is", "The{subject} is", "The {subject} is ", "The {subject}",
     "The {subject} of {subject} is", "In {group} the {subject} is"],
)  # fmt: skip
def test_a_template_without_its_placeholder_in_place_is_refused(template):
    with pytest.raises(ValueError, match="'t', template 1: ") as refused:
        build_task("t", ITEMS, [TEMPLATES[0], template], word_decoder())
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_appends_a_token_is_refused():
    decoder = word_decoder()
    decoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", 1)]
    )
    with pytest.raises(ValueError, match="tokens of 'The capital of' change"):
        build_task("t", ITEMS, TEMPLATES, decoder)


# The gate


def planted(monkeypatch, decoder, task, predicted, value=1.0):
    """Let the model's logits name the answers `predicted`, and another word more loudly."""
    logits = torch.zeros(task.n_prompts, 20)
    logits[:, 0] = 9.0  # outside the closed set
    logits[range(task.n_prompts), task.answer_ids[predicted].tolist()] = value
    monkeypatch.setattr(
        tasks, "recall_residuals", lambda *_args, **_options: SimpleNamespace(logits=logits)
    )
    return gate(decoder, task)


def test_gate_counts_the_closed_set_argmax_and_knows_chance(monkeypatch):
    decoder = word_decoder()
    task = build_task("t", ITEMS, TEMPLATES, decoder)
    result = planted(monkeypatch, decoder, task, np.array([0, 1, 2, 0, 1, 0]))
    assert result.correct.tolist() == [True] * 5 + [False]
    assert result.predicted.tolist() == [0, 1, 2, 0, 1, 0]
    assert (result.accuracy, result.chance, result.n) == (5 / 6, 1 / 3, 6)
    assert result.testable
    assert result.to_frame().loc[0, "reason"] == "accuracy 0.83, chance 0.333"
    uneven = build_task("t", ITEMS.assign(answer=["Rome", "Rome", "Paris"]), TEMPLATES, decoder)
    result = planted(monkeypatch, decoder, uneven, np.array([0, 0, 1, 0, 1, 0]))
    assert (result.chance, result.testable) == (4 / 6, False)


def test_gate_refuses_logits_that_are_not_finite(monkeypatch):
    decoder = word_decoder()
    task = build_task("t", ITEMS, TEMPLATES, decoder)
    with pytest.raises(ValueError, match="not finite"):
        planted(monkeypatch, decoder, task, np.zeros(6, dtype=int), value=float("nan"))


# Pairs


def table(counts, n_templates=2):
    """Prompts whose answers have `counts` subjects each, answers interleaved."""
    rows = [
        (f"s{a}-{i}", f"a{a}") for i in range(max(counts)) for a, n in enumerate(counts) if i < n
    ]
    frame = pd.DataFrame(rows, columns=["subject", "answer"]).assign(group="")
    return pd.concat([frame.assign(template=t) for t in range(n_templates)], ignore_index=True)


def naive_pairs(prompts, same_answer=False, mask=None):
    rows = prompts.to_dict("records")
    keep = range(len(rows)) if mask is None else np.flatnonzero(mask)
    return [
        [r, d]
        for r in keep
        for d in keep
        if rows[r]["template"] == rows[d]["template"]
        and rows[r]["group"] == rows[d]["group"]
        and rows[r]["subject"] != rows[d]["subject"]
        and (rows[r]["answer"] == rows[d]["answer"]) == same_answer
    ]


@pytest.mark.parametrize("counts", [[1] * 7, [4, 4, 4, 4], [3, 3, 3, 2, 2], [5, 1]])
@pytest.mark.parametrize("same_answer", [False, True])
def test_all_pairs_equal_the_naive_loop(counts, same_answer):
    prompts = table(counts)
    mask = np.arange(len(prompts)) % 3 != 0
    assert ordered_pairs(prompts, same_answer=same_answer).tolist() == naive_pairs(
        prompts, same_answer
    )
    assert ordered_pairs(prompts, same_answer=same_answer, mask=mask).tolist() == naive_pairs(
        prompts, same_answer, mask
    )


def test_pairs_stay_within_a_group():
    prompts = table([1] * 4, n_templates=1)
    prompts = pd.concat([prompts.assign(group=g) for g in ("one", "two")], ignore_index=True)
    pairs = ordered_pairs(prompts)
    assert pairs.tolist() == naive_pairs(prompts)
    assert len(pairs) == 2 * 4 * 3


@pytest.mark.parametrize(
    ("counts", "n_donors"), [([1] * 12, 1), ([1] * 12, 5), ([4, 4, 4, 4], 4), ([3, 3, 3, 2, 2], 6)]
)
def test_chosen_donors_are_valid_and_exactly_balanced(counts, n_donors):
    prompts = table(counts)
    pairs = ordered_pairs(prompts, donors_per_prompt=n_donors)
    allowed = {tuple(pair) for pair in naive_pairs(prompts)}
    assert len({tuple(pair) for pair in pairs.tolist()} & allowed) == len(pairs)
    for column in (0, 1):
        assert Counter(pairs[:, column].tolist()) == dict.fromkeys(range(len(prompts)), n_donors)


def test_more_donors_than_exist_gives_all_pairs():
    for counts in ([4, 4, 4, 4], [5, 1]):
        prompts = table(counts)
        pairs = ordered_pairs(prompts, donors_per_prompt=99)
        assert pairs.tolist() == naive_pairs(prompts)


def test_each_prompt_has_one_donor_of_the_same_answer():
    prompts = table([4, 4, 4, 4])
    pairs = ordered_pairs(prompts, donors_per_prompt=1, same_answer=True)
    assert sorted(pairs[:, 1].tolist()) == pairs[:, 0].tolist() == list(range(len(prompts)))
    answers = prompts["answer"].to_numpy()
    assert (answers[pairs[:, 0]] == answers[pairs[:, 1]]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_no_partner_gives_no_pairs_in_the_right_shape():
    assert ordered_pairs(table([1, 1, 1]), same_answer=True).shape == (0, 2)
    assert ordered_pairs(table([1, 1]), mask=np.zeros(4, dtype=bool)).shape == (0, 2)


def test_bad_pair_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ordered_pairs(table([1, 1]), donors_per_prompt=0)
    with pytest.raises(ValueError, match="4 prompts need one flag each"):
        ordered_pairs(table([1, 1]), mask=np.ones(3, dtype=bool))


# The contexts and the embedded model


def test_contexts_have_their_columns_and_no_empty_cell():
    contexts = load_contexts()
    assert contexts.columns.tolist() == ["kind", "context", "continuation"]
    assert (contexts != "").all(axis=None)


@pytest.mark.parametrize("name", task_names())
def test_every_task_is_single_token_and_aligned_for_the_embedded_model(embedded, name):
    task = load_task(name, embedded)
    decode = embedded.tokenizer.decode
    for row in task.prompts.itertuples():
        assert decode([row.tokens[row.subject_position]]) == f" {row.subject}"
        assert decode(row.tokens) == row.text
    assert [decode([token]) for token in task.answer_ids] == [f" {a}" for a in task.answers]


def test_embedded_model_names_capitals_but_does_not_add_months(embedded):
    capitals = gate(embedded, load_task("capitals", embedded))
    assert capitals.testable
    assert capitals.accuracy > 0.95
    months = load_task("months-arithmetic", embedded)
    one_template = replace(months, prompts=months.prompts[months.prompts["template"] == 0])
    months = gate(embedded, one_template)
    assert not months.testable
    assert (months.n, months.chance) == (144, 1 / 12)
    assert months.accuracy < 0.2
