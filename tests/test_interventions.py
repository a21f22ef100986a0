"""Edits: each does what it says, and only that."""

import pytest
import torch

from lib.interventions import (
    add,
    exchange,
    exchange_direction,
    exchange_norm,
    keep,
    random_directions,
)

STATE = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1)) * 3
DONOR = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(2)) * 7


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def test_exchange_returns_the_donor_and_shares_no_memory() -> None:
    result = exchange(STATE, DONOR)
    assert torch.equal(result, DONOR)
    result.zero_()
    assert DONOR.abs().sum() > 0


def test_direction_exchange_keeps_the_norm_and_takes_the_direction() -> None:
    result = exchange_direction(STATE, DONOR)
    assert torch.allclose(result.norm(dim=-1), STATE.norm(dim=-1), rtol=1e-6)
    assert torch.allclose(cosine(result, DONOR), torch.ones(4, 3).double(), atol=1e-6)


def test_norm_exchange_keeps_the_direction_and_takes_the_norm() -> None:
    result = exchange_norm(STATE, DONOR)
    assert torch.allclose(result.norm(dim=-1), DONOR.norm(dim=-1), rtol=1e-6)
    assert torch.allclose(cosine(result, STATE), torch.ones(4, 3).double(), atol=1e-6)


def test_direction_and_norm_exchanged_together_are_the_exchange() -> None:
    assert torch.allclose(exchange_norm(exchange_direction(STATE, DONOR), DONOR), DONOR, rtol=1e-5)


def test_add_adds_and_keep_keeps() -> None:
    assert torch.equal(add(STATE, DONOR), STATE + DONOR)
    assert torch.equal(keep(STATE, DONOR), STATE)


def test_random_directions_keep_norms_and_are_reproducible() -> None:
    first, second = (random_directions(STATE, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first.norm(dim=-1), STATE.norm(dim=-1), rtol=1e-6)
    assert cosine(first, STATE).abs().max() < 0.99


def test_zero_state_has_no_direction() -> None:
    with pytest.raises(ValueError, match="no direction"):
        exchange_norm(torch.zeros(2, 16), DONOR[0, :2])
