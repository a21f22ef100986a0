"""Edits: each does what it says, and only that."""

import math

import pytest
import torch
from torch import Tensor

from lib.engine.edits import (
    Edit,
    ExchangeSubspace,
    Rotate,
    Scale,
    Shift,
    TurnLikeNormExchange,
    across,
    add,
    angle_degrees,
    apply_edit,
    chord,
    exchange,
    exchange_direction,
    exchange_norm,
)
from lib.engine.extraction import logit_lens
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
    assert torch.equal(Scale(1.0)(STATE, DONOR), STATE)


def test_zero_state_has_no_direction() -> None:
    with pytest.raises(ValueError, match="no direction"):
        exchange_norm(torch.zeros(2, 16), DONOR[0, :2])


@pytest.mark.parametrize("factor", [0.25, 2**-0.5, 1.0, 4.0])
def test_scaling_keeps_the_direction_and_multiplies_the_norm(factor: float) -> None:
    result = Scale(factor)(STATE, DONOR)
    assert torch.allclose(result.norm(dim=-1), factor * STATE.norm(dim=-1), rtol=1e-6)
    assert torch.allclose(cosine(result, STATE), torch.ones(4, 3).double(), atol=1e-6)


def test_scaling_before_the_final_norm_changes_no_logit(llama: Decoder) -> None:
    """An RMSNorm divides by the norm; its epsilon is all that is left of a scaling."""
    states = torch.randn(6, llama.d_model, generator=torch.Generator().manual_seed(4)) * 30
    clean = logit_lens(llama, states)
    for factor in (0.25, 0.5, 2.0, 4.0):
        assert (logit_lens(llama, Scale(factor)(states, states)) - clean).abs().max() < 1e-4


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_factor_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        Scale(factor)


DOSES = (0.0, 5.0, 45.0, 90.0, 180.0)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_rotation_by_zero_is_the_identity() -> None:
    state, target = drawn(6, 32, scale=40), drawn(6, 32, seed=1)
    torch.testing.assert_close(Rotate(0)(state, target), state, rtol=1e-6, atol=0)


def test_rotation_by_the_full_angle_lands_on_the_targets_direction() -> None:
    state, target = drawn(6, 32, scale=40), drawn(6, 32, seed=1)
    turned = Rotate(angle_degrees(state, target)[:, None])(state, target)
    expected = target * state.norm(dim=-1, keepdim=True) / target.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("degrees", DOSES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rotation_keeps_the_norm_and_turns_by_the_dose(degrees: float, scale: float) -> None:
    state, target = drawn(8, 48, scale=scale), drawn(8, 48, seed=1)
    turned = Rotate(degrees)(state, target)
    torch.testing.assert_close(turned.norm(dim=-1), state.norm(dim=-1), rtol=1e-6, atol=0)
    angle = angle_degrees(state, turned)
    torch.testing.assert_close(angle, torch.full_like(angle, degrees), rtol=1e-5, atol=2e-4)


def test_rotation_stays_in_the_plane_of_state_and_target() -> None:
    state, target = drawn(5, 32), drawn(5, 32, seed=1)
    turned = Rotate(70)(state, target)
    basis, _ = torch.linalg.qr(torch.stack([state, target], dim=-1))
    inside = basis @ (basis.mT @ turned[..., None])
    torch.testing.assert_close(inside[..., 0], turned, rtol=1e-5, atol=1e-6)


def test_rotation_does_not_depend_on_the_targets_length() -> None:
    state, target = drawn(5, 32), drawn(5, 32, seed=1)
    torch.testing.assert_close(Rotate(30)(state, target), Rotate(30)(state, 1e3 * target))


@pytest.mark.parametrize("degrees", DOSES)
def test_all_edits_of_one_dose_move_a_state_equally_far(degrees: float) -> None:
    state, donor = drawn(8, 48, scale=30).double(), drawn(8, 48, seed=1).double()
    expected = 2 * state.norm(dim=-1) * math.sin(math.radians(degrees) / 2)
    torch.testing.assert_close(chord(state, degrees)[:, 0], expected)
    for edited in (
        Rotate(degrees)(state, donor),
        Shift(degrees)(state, donor),
    ):
        torch.testing.assert_close((edited - state).norm(dim=-1), expected)


def test_a_shift_goes_along_its_vector() -> None:
    state, vector = drawn(8, 48), drawn(8, 48, seed=1)
    zero = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(
        angle_degrees(Shift(25)(state, vector) - state, vector), zero, atol=1e-3, rtol=0
    )


def test_edits_keep_shape_and_dtype_and_leave_their_input_alone() -> None:
    state, donor = drawn(2, 3, 16).bfloat16(), drawn(2, 3, 16, seed=1)
    before = state.clone()
    turned = Rotate(30)(state, donor)
    assert turned.shape == state.shape and turned.dtype == torch.bfloat16
    assert torch.equal(state, before)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_a_parallel_or_antiparallel_target_is_refused(factor: float) -> None:
    state = drawn(3, 16)
    target = drawn(3, 16, seed=1)
    target[1] = factor * state[1]
    with pytest.raises(ValueError, match=r"State 1 .* parallel or antiparallel"):
        Rotate(20)(state, target)
    with pytest.raises(ValueError, match="plane"):
        across(state.double(), target.double())


def test_what_cannot_be_edited_is_refused_in_one_line() -> None:
    state = drawn(3, 16)
    for call, message in (
        (lambda: Rotate(20)(state, drawn(3, 15)), "15 wide, the state 16"),
        (lambda: Shift(20)(state, drawn(3, 17)), "17 wide"),
        (lambda: Rotate(20)(torch.zeros(1, 16), state[:1]), "norm 0"),
        (lambda: Shift(20)(state, torch.zeros(3, 16)), "norm 0"),
        (lambda: Rotate(float("nan")), "finite angle"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_turn_like_a_norm_exchange_moves_as_far_and_keeps_the_norm() -> None:
    state, donor = drawn(8, 48, scale=30).double(), drawn(8, 48, seed=1, scale=42).double()
    turned, exchanged = (edit(state, donor) for edit in (TurnLikeNormExchange(), exchange_norm))
    moved = (exchanged - state).norm(dim=-1)
    assert moved.min() > 0.01
    torch.testing.assert_close((turned - state).norm(dim=-1), moved)
    torch.testing.assert_close(turned.norm(dim=-1), state.norm(dim=-1))
    nearer = angle_degrees(turned, donor) < angle_degrees(state, donor)
    assert bool(nearer.all())  # at about 90 degrees, a turn of up to 60 is towards the donor


def test_a_turn_farther_than_twice_the_norm_is_refused() -> None:
    donor = DONOR[0].clone()
    donor[1] *= 3.01 * STATE[0, 1].norm() / donor[1].norm()
    donor[[0, 2]] *= (
        2 * STATE[0, [0, 2]].norm(dim=-1, keepdim=True) / donor[[0, 2]].norm(dim=-1, keepdim=True)
    )
    with pytest.raises(ValueError, match="Donor 1 is more than three times as long"):
        TurnLikeNormExchange()(STATE[0], donor)


def basis(k: int, width: int) -> Tensor:
    return torch.linalg.qr(drawn(width, k, seed=5))[0].mT.contiguous()


@pytest.mark.parametrize("k", [1, 5, 16])
def test_a_subspace_exchange_takes_the_donors_coordinates_inside_alone(k: int) -> None:
    rows = basis(k, 16)
    inside, outside = (ExchangeSubspace(rows, complement=c) for c in (False, True))
    edited, other = inside(STATE, DONOR), outside(STATE, DONOR)
    torch.testing.assert_close(edited @ rows.mT, DONOR @ rows.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other @ rows.mT, STATE @ rows.mT, rtol=1e-4, atol=1e-4)
    rest = torch.linalg.qr(torch.cat([rows, drawn(16 - k, 16)]).mT)[0].mT[k:]
    torch.testing.assert_close(edited @ rest.mT, STATE @ rest.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other @ rest.mT, DONOR @ rest.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edited + other, STATE + DONOR, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (2 * torch.eye(3, 16), r"orthonormal; their products are up to 3.0e\+00 off"),
        (torch.ones(2, 16) / 4, "orthonormal"),
        (torch.full((1, 16), torch.nan), "orthonormal"),
        (torch.ones(16) / 4, r"\[k, d_model\]"),
        (torch.zeros(0, 16), "1 ≤ k"),
    ],
)
def test_a_basis_that_is_not_orthonormal_is_refused(rows: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExchangeSubspace(rows)


def test_a_basis_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="15 wide"):
        ExchangeSubspace(basis(2, 15))(STATE, DONOR)


def spoiled(state: Tensor, _donor: Tensor) -> Tensor:
    changed = state.clone()
    changed[1, 2, 3] = torch.nan
    return changed


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (spoiled, "E returned NaN or infinity for item 5"),
        (lambda state, donor: state / 0, "E returned NaN or infinity for item 0"),
        (lambda state, donor: state.double(), "E returned dtype torch.float64 for item 0"),
        (lambda state, donor: state.to("meta"), "E returned device meta for item 0"),
        (lambda state, donor: state[..., :5], r"E returned shape \(4, 3, 5\)"),
        (lambda state, donor: 3.0, "E returned float"),
        (lambda state, donor: Rotate(20)(state, state), "E: State 0 and its target are parallel"),
    ],
)
def test_what_an_edit_may_not_return_is_named_in_one_line(edit: Edit, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        apply_edit(edit, STATE, DONOR, "E", lambda item: f"item {item}")
    assert "\n" not in str(raised.value)
