"""Batches: every prompt is a path on one line that sees itself alone, and lines are full."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.engine.batches import (
    LINE_TOKENS,
    count_alike,
    equal_length_rows,
    lay_out,
    plant_prompts,
    stack_prompts,
)

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


def draw(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 500, size=length).tolist() for length in lengths]


PROMPTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=90), min_size=1, max_size=40)
"""Of three tokens, so that many begin alike."""


@given(prompts=PROMPTS, batch_tokens=st.sampled_from([1, 50, 128, 300, 2048]))
def test_every_prompt_is_a_path_that_sees_itself_alone(
    prompts: list[list[int]], batch_tokens: int
) -> None:
    batches = plant_prompts(prompts, range(len(prompts)), batch_tokens)
    assert sorted(int(row) for batch in batches for row in batch.rows) == list(range(len(prompts)))
    for batch in batches:
        assert batch.depths is not None and batch.seen is not None
        for row, line, path in zip(batch.rows, batch.lines, batch.columns, strict=True):
            own = path[: len(prompts[row])]
            assert batch.tokens[line, own].tolist() == prompts[row]
            assert batch.depths[line, own].tolist() == list(range(len(own)))
            for place, column in enumerate(own):
                seen = torch.nonzero(batch.seen[line, column])[:, 0].tolist()
                assert sorted(own[: place + 1].tolist()) == seen
        places = batch.members(batch.rows)
        assert places.tolist() == list(range(len(batch.rows)))


@given(lengths=LENGTHS, batch_tokens=st.sampled_from([1, 50, 128, 300, 2048]))
def test_a_batch_holds_the_tokens_it_may_or_one_line(lengths: list[int], batch_tokens: int) -> None:
    prompts = draw(lengths)
    for batch in plant_prompts(prompts, range(len(prompts)), batch_tokens):
        assert batch.tokens.numel() <= batch_tokens or len(batch.tokens) == 1
        assert batch.tokens.shape[1] <= max(LINE_TOKENS, max(lengths) + LINE_TOKENS // 2)


@given(prompts=PROMPTS)
def test_on_one_line_every_beginning_lies_once(prompts: list[list[int]]) -> None:
    line, before = [], []
    for row in sorted(range(len(prompts)), key=prompts.__getitem__):
        line.append((row, count_alike(before, prompts[row])))
        before = prompts[row]
    beginnings = {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)}
    assert lay_out(prompts, [line]).tokens.numel() == len(beginnings)


def test_few_places_stay_empty() -> None:
    lengths = np.random.default_rng(1).integers(4, 65, size=256).tolist()
    batches = plant_prompts(draw(lengths), range(256), 2048)
    assert sum(batch.tokens.numel() for batch in batches) < 1.25 * sum(lengths)


def test_prompts_behind_one_long_passage_share_its_line() -> None:
    passage, *ends = draw([200] + [8] * 12)
    batches = plant_prompts([passage + end for end in ends], range(12), 2048)
    assert sum(batch.tokens.numel() for batch in batches) < 3 * len(passage)


def test_only_the_rows_asked_for_are_planted() -> None:
    prompts = draw([3, 5, 7, 9])
    (batch,) = plant_prompts(prompts, [3, 1], 2048)
    assert sorted(batch.rows.tolist()) == [1, 3]
    assert batch.tokens.numel() == 14


def test_prompts_of_one_length_lie_one_to_a_line() -> None:
    prompts = draw([4, 4, 4])
    batch = stack_prompts(prompts, [2, 0])
    assert batch.tokens.tolist() == [prompts[2], prompts[0]]
    assert batch.depths is None and batch.seen is None
    assert batch.lines.tolist() == [0, 1] and batch.columns.tolist() == [[0, 1, 2, 3]] * 2


def test_rows_of_one_length_fill_batches() -> None:
    prompts = draw([4, 6, 4, 4, 6])
    assert list(equal_length_rows(prompts, 8)) == [[1], [4], [0, 2], [3]]
