"""Values that differ have digests that differ, and what has no safe name has none."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lib.engine.interventions import exchange, exchange_norm, rotate_by_displacement, scale
from lib.engine.readouts import distribution_measure
from lib.engine.recipes import NoRecipeError, digest_of
from lib.engine.steering import rotate

LOGITS = torch.arange(12.0).reshape(3, 4)

DIFFERENT: list[Any] = [
    None,
    True,
    1,
    1.0,
    "1",
    "1.0",
    [1],
    [[1]],
    [1, 1],
    [[1], 1],
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    ["a", 1, "b", 2],
    0.1 + 0.2,
    0.3,
    LOGITS,
    LOGITS.T.reshape(3, 4),
    LOGITS.reshape(4, 3),
    LOGITS.double(),
    LOGITS.bfloat16(),
    LOGITS.numpy(),
    LOGITS[:0],
    exchange,
    exchange_norm,
    scale,
    scale(0.5),
    scale(0.25),
    rotate_by_displacement(0.5),
    partial(rotate, degrees=3.0),
    partial(rotate, degrees=4.0),
    distribution_measure(LOGITS, [0]),
    distribution_measure(LOGITS + 1, [0]),
    distribution_measure(LOGITS, [1]),
    distribution_measure(LOGITS, [0], temperature=True),
]


def test_values_that_differ_have_digests_that_differ() -> None:
    digests = [digest_of(value) for value in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)
    assert digest_of("a", "b") != digest_of(["a", "b"]) != digest_of("ab")


def test_equal_values_made_twice_have_one_digest() -> None:
    assert digest_of(scale(0.5), LOGITS) == digest_of(scale(0.5), LOGITS.clone())
    assert digest_of(LOGITS.T) == digest_of(LOGITS.T.contiguous())
    assert digest_of(range(3), np.int64(2), (1.5,)) == digest_of([0, 1, 2], 2, [np.float64(1.5)])
    one, other = (distribution_measure(LOGITS.clone(), np.array([0])) for _ in range(2))
    assert digest_of(one) == digest_of(other)


def of_a_test(state: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    return state + donor


@pytest.mark.parametrize(
    "value",
    [
        lambda state, donor: state,
        of_a_test,
        partial(of_a_test, donor=LOGITS),
        partial(rotate, degrees=object()),
        [exchange, of_a_test],
        {1, 2},
        np.array([object()]),
        torch.add,
        "text".upper,
    ],
)
def test_what_has_no_safe_name_has_none(value: Any) -> None:
    with pytest.raises(NoRecipeError):
        digest_of(value)


def test_a_function_that_took_anothers_name_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.engine import interventions

    monkeypatch.setattr(interventions, "exchange", exchange_norm)
    with pytest.raises(NoRecipeError):
        digest_of(exchange)
