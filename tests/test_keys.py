"""Keys: values that differ have keys that differ, and what cannot be told apart has none."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lib.engine import keys
from lib.engine.edits import Exchange, Rotate, Scale, exchange, exchange_norm
from lib.engine.keys import NoKeyError, key_of
from lib.engine.readouts import DistributionMeasure

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
    Scale(0.5),
    Scale(0.25),
    Rotate(3.0),
    Rotate(4.0),
    Rotate(torch.tensor(3.0)),
    DistributionMeasure(LOGITS, [0]),
    DistributionMeasure(LOGITS + 1, [0]),
    DistributionMeasure(LOGITS, [1]),
    DistributionMeasure(LOGITS, [0], temperature=True),
]


def test_values_that_differ_have_keys_that_differ() -> None:
    keys = [key_of(value) for value in DIFFERENT]
    assert len(set(keys)) == len(DIFFERENT)
    assert key_of("a", "b") != key_of(["a", "b"]) != key_of("ab")


def test_equal_values_made_twice_have_one_digest() -> None:
    assert key_of(Scale(0.5), LOGITS) == key_of(Scale(0.5), LOGITS.clone())
    assert key_of(LOGITS.T) == key_of(LOGITS.T.contiguous())
    assert key_of(range(3), np.int64(2), (1.5,)) == key_of([0, 1, 2], 2, [np.float64(1.5)])
    one, other = (DistributionMeasure(LOGITS.clone(), np.array([0])) for _ in range(2))
    assert key_of(one) == key_of(other)


def test_an_array_that_several_values_share_is_read_once_and_gives_the_keys_it_always_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = [DistributionMeasure(LOGITS, [0]), DistributionMeasure(LOGITS, [1])]
    alone, read, n_read = [key_of(one) for one in shared], keys.Read(), []
    as_bytes = keys._bytes
    monkeypatch.setattr(keys, "_bytes", lambda array: n_read.append(1) or as_bytes(array))
    assert [key_of(one, read=read) for one in shared] == alone
    assert len(n_read) == 1
    for number in range(50):  # a place in memory that a later array takes again
        made = np.full(3, number)
        assert key_of(made, read=read) == key_of(made)
        del made


def of_a_test(state: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    return state + donor


@dataclass(frozen=True)
class OfATest:
    """An edit whose code no key would hold."""

    factor: float


@pytest.mark.parametrize(
    "value",
    [
        lambda state, donor: state,
        of_a_test,
        OfATest(2.0),
        Exchange,
        partial(Scale, 2.0),
        [exchange, of_a_test],
        {1, 2},
        np.array([object()]),
        torch.add,
        "text".upper,
    ],
)
def test_what_cannot_be_told_apart_has_no_key(value: Any) -> None:
    with pytest.raises(NoKeyError):
        key_of(value)


def test_a_class_that_took_anothers_name_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.engine import edits

    taken = type("Exchange", (edits.Exchange,), {})
    monkeypatch.setattr(edits, "Exchange", taken)
    assert keys._class_key.__wrapped__(Scale)
    with pytest.raises(NoKeyError):
        keys._class_key.__wrapped__(type(edits.exchange))
