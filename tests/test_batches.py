"""Batches: every prompt lies whole on one line, and lines are full."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.engine.batches import LINE_TOKENS, equal_length_rows, pack_prompts, stack_prompts

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


def draw(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 500, size=length).tolist() for length in lengths]


@given(lengths=LENGTHS, batch_tokens=st.sampled_from([1, 50, 64, 300, 2048]))
def test_every_prompt_lies_whole_on_one_line(lengths: list[int], batch_tokens: int) -> None:
    prompts = draw(lengths)
    batches = pack_prompts(prompts, range(len(prompts)), batch_tokens)
    assert sorted(int(row) for batch in batches for row in batch.rows) == list(range(len(prompts)))
    for batch in batches:
        covered = torch.zeros_like(batch.tokens)
        assert batch.places is not None
        for row, line, start in zip(batch.rows, batch.lines, batch.starts, strict=True):
            own = slice(int(start), int(start) + len(prompts[row]))
            assert batch.tokens[line, own].tolist() == prompts[row]
            assert batch.places[line, own].tolist() == list(range(len(prompts[row])))
            covered[line, own] += 1
        assert covered.max() == 1
        # What no prompt covers begins anew with every token, so that no token sees it.
        assert batch.places[covered == 0].eq(0).all()


@given(lengths=LENGTHS, batch_tokens=st.sampled_from([1, 50, 64, 300, 2048]))
def test_a_batch_holds_the_tokens_it_may_or_one_line(lengths: list[int], batch_tokens: int) -> None:
    prompts = draw(lengths)
    for batch in pack_prompts(prompts, range(len(prompts)), batch_tokens):
        assert batch.tokens.numel() <= batch_tokens or len(batch.tokens) == 1
        assert batch.tokens.shape[1] <= max(*lengths, LINE_TOKENS)


def test_few_places_stay_empty() -> None:
    lengths = np.random.default_rng(1).integers(4, 65, size=256).tolist()
    batches = pack_prompts(draw(lengths), range(256), 2048)
    assert sum(batch.tokens.numel() for batch in batches) < 1.03 * sum(lengths)


def test_only_the_rows_asked_for_are_packed() -> None:
    prompts = draw([3, 5, 7, 9])
    (batch,) = pack_prompts(prompts, [3, 1], 2048)
    assert sorted(batch.rows.tolist()) == [1, 3]
    assert batch.tokens.numel() == 14


def test_prompts_of_one_length_lie_one_to_a_line() -> None:
    prompts = draw([4, 4, 4])
    batch = stack_prompts(prompts, [2, 0])
    assert batch.tokens.tolist() == [prompts[2], prompts[0]]
    assert batch.places is None
    assert batch.lines.tolist() == [0, 1] and batch.starts.tolist() == [0, 0]


def test_rows_of_one_length_fill_batches() -> None:
    prompts = draw([4, 6, 4, 4, 6])
    assert list(equal_length_rows(prompts, 8)) == [[1], [4], [0, 2], [3]]
