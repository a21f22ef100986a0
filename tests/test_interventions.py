"""Edits: each does what it says, and only that."""

import numpy as np
import pytest
import torch

from lib.engine.extraction import logit_lens
from lib.engine.interventions import (
    add,
    exchange,
    exchange_direction,
    exchange_norm,
    keep,
    random_directions,
    rotate_by_displacement,
    scale,
)
from lib.engine.models import Decoder

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_random_directions_have_the_precision_of_the_states(dtype: torch.dtype) -> None:
    drawn = random_directions(STATE.to(dtype), torch.Generator().manual_seed(5))
    assert drawn.dtype == dtype


def test_zero_state_has_no_direction() -> None:
    with pytest.raises(ValueError, match="no direction"):
        exchange_norm(torch.zeros(2, 16), DONOR[0, :2])


@pytest.mark.parametrize("factor", [0.25, 2**-0.5, 1.0, 4.0])
def test_scaling_keeps_the_direction_and_multiplies_the_norm(factor: float) -> None:
    result = scale(factor)(STATE, DONOR)
    assert torch.allclose(result.norm(dim=-1), factor * STATE.norm(dim=-1), rtol=1e-6)
    assert torch.allclose(cosine(result, STATE), torch.ones(4, 3).double(), atol=1e-6)


@pytest.mark.parametrize("displacement", [0.3, 1.0, 2**0.5, 2.0])
def test_matched_rotation_keeps_the_norm_and_moves_as_far_as_it_says(displacement: float) -> None:
    result = rotate_by_displacement(displacement)(STATE, DONOR).double()
    state = STATE.double()
    assert torch.allclose(result.norm(dim=-1), state.norm(dim=-1), rtol=1e-6)
    moved = (result - state).norm(dim=-1) / state.norm(dim=-1)
    assert torch.allclose(moved, torch.full((4, 3), displacement).double(), rtol=1e-6)


def test_matched_rotation_stays_in_the_plane_of_state_and_donor() -> None:
    result = rotate_by_displacement(0.7)(STATE, DONOR)
    for row in range(4):
        three = torch.stack([result[row, 0], STATE[row, 0], DONOR[row, 0]]).double()
        assert torch.linalg.svdvals(three)[2] < 1e-5 * torch.linalg.svdvals(three)[0]


@pytest.mark.parametrize("displacement", [0.3, 1.0, 1.9])
def test_matched_rotation_turns_towards_the_donor(displacement: float) -> None:
    """By φ = 2·arcsin(displacement / 2), so the angle that is left to the donor is θ − φ."""
    result = rotate_by_displacement(displacement)(STATE.double(), DONOR.double())
    turn = 2 * np.arcsin(displacement / 2)
    left = torch.acos(cosine(STATE, DONOR)) - turn
    assert torch.allclose(cosine(result, DONOR), torch.cos(left), atol=1e-9)


def test_matched_rotation_moves_as_far_as_the_scaling_it_is_matched_to() -> None:
    for factor in (0.25, 0.5, 2.0):
        scaled = (scale(factor)(STATE, DONOR) - STATE).norm(dim=-1)
        turned = (rotate_by_displacement(abs(factor - 1))(STATE, DONOR) - STATE).norm(dim=-1)
        assert torch.allclose(scaled, turned, rtol=1e-5)


def test_scaling_before_the_final_norm_changes_no_logit(llama: Decoder) -> None:
    """An RMSNorm divides by the norm; its epsilon is all that is left of a scaling."""
    states = torch.randn(6, llama.d_model, generator=torch.Generator().manual_seed(4)) * 30
    clean = logit_lens(llama, states)
    for factor in (0.25, 0.5, 2.0, 4.0):
        assert (logit_lens(llama, scale(factor)(states, states)) - clean).abs().max() < 1e-4


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_factor_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        scale(factor)


@pytest.mark.parametrize("displacement", [0.0, -0.5, 2.01, float("nan")])
def test_displacement_out_of_reach_is_refused(displacement: float) -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        rotate_by_displacement(displacement)


def test_donor_parallel_to_the_state_spans_no_plane() -> None:
    with pytest.raises(ValueError, match="parallel"):
        rotate_by_displacement(1.0)(STATE, 2 * STATE)
