"""Edits with a dose: rotations, equal displacement, held-out centroids, the unembedding's way."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.engine.extraction import extract_residuals, logit_lens
from lib.engine.models import Decoder
from lib.engine.steering import (
    across,
    angle_degrees,
    chord,
    held_out_centroids,
    rotate,
    rotation,
    shift,
    stretch,
    unembedding_direction,
)

DOSES = (0.0, 5.0, 45.0, 90.0, 180.0)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_rotation_by_zero_is_the_identity() -> None:
    state, target = drawn(6, 32, scale=40), drawn(6, 32, seed=1)
    torch.testing.assert_close(rotate(state, target, 0), state, rtol=1e-6, atol=0)


def test_rotation_by_the_full_angle_lands_on_the_targets_direction() -> None:
    state, target = drawn(6, 32, scale=40), drawn(6, 32, seed=1)
    turned = rotate(state, target, angle_degrees(state, target)[:, None])
    expected = target * state.norm(dim=-1, keepdim=True) / target.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("degrees", DOSES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rotation_keeps_the_norm_and_turns_by_the_dose(degrees: float, scale: float) -> None:
    state, target = drawn(8, 48, scale=scale), drawn(8, 48, seed=1)
    turned = rotate(state, target, degrees)
    torch.testing.assert_close(turned.norm(dim=-1), state.norm(dim=-1), rtol=1e-6, atol=0)
    angle = angle_degrees(state, turned)
    torch.testing.assert_close(angle, torch.full_like(angle, degrees), rtol=1e-5, atol=2e-4)


def test_rotation_stays_in_the_plane_of_state_and_target() -> None:
    state, target = drawn(5, 32), drawn(5, 32, seed=1)
    turned = rotate(state, target, 70)
    basis, _ = torch.linalg.qr(torch.stack([state, target], dim=-1))
    inside = basis @ (basis.mT @ turned[..., None])
    torch.testing.assert_close(inside[..., 0], turned, rtol=1e-5, atol=1e-6)


def test_rotation_does_not_depend_on_the_targets_length() -> None:
    state, target = drawn(5, 32), drawn(5, 32, seed=1)
    torch.testing.assert_close(rotate(state, target, 30), rotate(state, 1e3 * target, 30))


@pytest.mark.parametrize("degrees", DOSES)
def test_all_edits_of_one_dose_move_a_state_equally_far(degrees: float) -> None:
    state, donor = drawn(8, 48, scale=30).double(), drawn(8, 48, seed=1).double()
    expected = 2 * state.norm(dim=-1) * math.sin(math.radians(degrees) / 2)
    torch.testing.assert_close(chord(state, degrees)[:, 0], expected)
    for edited in (
        rotate(state, donor, degrees),
        shift(state, donor, degrees),
        stretch(state, degrees),
    ):
        torch.testing.assert_close((edited - state).norm(dim=-1), expected)


def test_a_shift_goes_along_its_vector_and_a_stretch_along_the_state() -> None:
    state, vector = drawn(8, 48), drawn(8, 48, seed=1)
    zero = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(
        angle_degrees(shift(state, vector, 25) - state, vector), zero, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(angle_degrees(stretch(state, 25), state), zero, atol=1e-3, rtol=0)


def test_edits_keep_shape_and_dtype_and_leave_their_input_alone() -> None:
    state, donor = drawn(2, 3, 16).bfloat16(), drawn(2, 3, 16, seed=1)
    before = state.clone()
    turned = rotation(30)(state, donor)
    assert turned.shape == state.shape and turned.dtype == torch.bfloat16
    assert torch.equal(state, before)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_a_parallel_or_antiparallel_target_is_refused(factor: float) -> None:
    state = drawn(3, 16)
    target = drawn(3, 16, seed=1)
    target[1] = factor * state[1]
    with pytest.raises(ValueError, match=r"State 1 .* parallel or antiparallel"):
        rotate(state, target, 20)
    with pytest.raises(ValueError, match="plane"):
        across(state.double(), target.double())


def test_what_cannot_be_edited_is_refused_in_one_line() -> None:
    state = drawn(3, 16)
    for call, message in (
        (lambda: rotate(state, drawn(3, 15), 20), "15 wide, the state 16"),
        (lambda: shift(state, drawn(3, 17), 20), "17 wide"),
        (lambda: rotate(torch.zeros(1, 16), state[:1], 20), "norm 0"),
        (lambda: shift(state, torch.zeros(3, 16), 20), "norm 0"),
        (lambda: rotate(state, drawn(3, 16, seed=1), float("nan")), "finite angle"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_held_out_centroids_equal_a_naive_loop_and_never_see_the_held_out_group() -> None:
    states = drawn(2, 12, 8)
    labels, groups = np.arange(12) % 3, np.arange(12) // 4
    usable = np.ones(12, dtype=bool)
    usable[7] = False
    wanted, held_out = [0, 1, 2, 1], [0, 1, 2, 0]
    found = held_out_centroids(states, labels, groups, wanted, held_out, usable)
    for case, (label, group) in enumerate(zip(wanted, held_out, strict=True)):
        rows = [i for i in range(12) if labels[i] == label and groups[i] != group and usable[i]]
        torch.testing.assert_close(found[:, case], states[:, rows].mean(dim=1))
    poisoned = states.clone()
    poisoned[:, groups == 0] = float("nan")
    assert torch.isfinite(held_out_centroids(poisoned, labels, groups, [0, 1], [0, 0])).all()
    with pytest.raises(ValueError, match="label 5"):
        held_out_centroids(states, labels, groups, [5], [0])


def test_unembedding_direction_is_the_steepest_way_to_the_target(decoder: Decoder) -> None:
    block = decoder.n_blocks - 1
    states = extract_residuals(decoder, [[3, 4, 5], [6, 7, 8]], blocks=[block]).states[0]
    way = unembedding_direction(decoder, states, [9, 10], [11, 12])

    def difference(at: Tensor) -> Tensor:
        z = logit_lens(decoder, at).double()
        return torch.stack([z[0, 9] - z[0, 11], z[1, 10] - z[1, 12]])

    def gain(vector: Tensor) -> Tensor:
        return difference(shift(states, vector, 0.2)) - difference(states)

    best = gain(way)
    assert (best > 0).all()
    for seed in range(5):
        assert (gain(drawn(*way.shape, seed=seed)) < best).all()
        tilted = (
            way / way.norm(dim=-1, keepdim=True)
            + 0.5 * drawn(*way.shape, seed=seed) / way.shape[-1] ** 0.5
        )
        assert (gain(tilted) < best).all()


def test_unembedding_direction_refuses_a_target_that_is_its_source(llama: Decoder) -> None:
    states = drawn(2, llama.d_model)
    with pytest.raises(ValueError, match="both target and source"):
        unembedding_direction(llama, states, [1, 2], [3, 2])
    with pytest.raises(ValueError, match="2 states, 1 targets"):
        unembedding_direction(llama, states, [1], [3, 2])
