"""Edits: what an intervention does to a residual stream, as functions of state and donor.

An edit is called with states and donors `[..., d_model]` and returns new states of the same shape,
dtype and device. The donor is another prompt's state, or a vector to act with; block and position
belong to the sweep. What an edit's fields are is what it does, so they are its key in the store.

Doses are angles φ in degrees, and all edits of one dose move a state equally far:

    ‖h′ − h‖ = 2 ‖h‖ sin(φ/2),

the chord of a turn by φ. What differs is the way: along the sphere towards a target (`Rotate`)
or along a fixed vector (`Shift`). Five lines steer any Hugging Face decoder:

    >>> decoder = load_decoder()
    >>> prompts = tokenize(decoder, ["The capital of France is", "The capital of Japan is"])
    >>> target = extract_residuals(decoder, prompts, blocks=[24]).states[0, 1]
    >>> with steer(decoder, 24, Rotate(40), target, positions=[4]):
    ...     tokens = generate(decoder, prompts[:1], n_new_tokens=5)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Edit = Callable[[Tensor, Tensor], Tensor]
Dose = float | Tensor
_LEAST_SINE = 1e-6
_ORTHONORMAL = 1e-4  # float32 bases of a few hundred rows stay well below


@dataclass(frozen=True)
class Exchange:
    """The donor's state: activation patching."""

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return h′ = h_donor."""
        return donor.expand_as(state).clone()


@dataclass(frozen=True)
class ExchangeDirection:
    """The donor's direction with the state's own norm; ValueError for a donor of norm 0."""

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return h′ = ‖h‖ · h_donor / ‖h_donor‖."""
        return unit(donor) * norm(state)


@dataclass(frozen=True)
class ExchangeNorm:
    """The state's own direction with the donor's norm; ValueError for a state of norm 0."""

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return h′ = ‖h_donor‖ · h / ‖h‖."""
        return unit(state) * norm(donor)


@dataclass(frozen=True)
class Add:
    """The sum of both: additive steering, the donor being a steering vector."""

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return h′ = h + donor."""
        return state + donor


exchange, add = Exchange(), Add()
exchange_direction, exchange_norm = ExchangeDirection(), ExchangeNorm()


@dataclass(frozen=True)
class Scale:
    """The norm times `factor`, the direction kept; the donor plays no part.

    The displacement ‖h′ − h‖ is |c − 1|·‖h‖.

    Raises:
        ValueError: a factor that is not positive and finite.
    """

    factor: float

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(f"A factor must be positive and finite, got {self.factor}.")

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:  # noqa: ARG002 (edits take donors)
        """Return h′ = c·h."""
        return state * self.factor


@dataclass(frozen=True, eq=False)
class Rotate:
    """The state turned by φ towards the donor, in the plane of both, its norm kept.

    At φ = θ(h, donor) the result points as the donor does; beyond it, past the donor. Of the donor
    only the direction matters. Computed in float64, returned in the state's dtype.

    Attributes:
        degrees: φ, a number or a tensor `[..., 1]`.

    Raises:
        ValueError: a dose that is not finite; when called, another width, a zero vector, or a donor
            parallel or antiparallel to its state.
    """

    degrees: Dose

    def __post_init__(self) -> None:
        _check_dose(self.degrees)

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return h′ = ‖h‖ (u cos φ + v sin φ), u = h / ‖h‖, v as `across` returns it."""
        return _turn(state, donor, _radians(self.degrees, state))


@dataclass(frozen=True)
class TurnLikeNormExchange:
    """The state turned towards the donor by as much as `ExchangeNorm` would move it.

    The distance |‖h_donor‖ − ‖h‖| that the exchange of norms spends along the radius is spent on
    direction alone. Of donors more than three times as long as their state there is no such turn.

    Raises:
        ValueError: when called, a donor too long, or as `Rotate`.
    """

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return `Rotate` by φ = 2·arcsin(|‖h_donor‖ − ‖h‖| / 2‖h‖)."""
        wide = _wide(state)
        _check_zero(norm(wide))
        half = (norm(_wide(donor)) - norm(wide)).abs() / (2 * norm(wide))
        if bool((half > 1).any()):
            item = int((half.reshape(-1) > 1).nonzero()[0])
            raise ValueError(
                f"Donor {item} is more than three times as long as its state, farther than any "
                "turn that keeps the norm can reach; choose another donor."
            )
        return _turn(state, donor, 2 * half.asin())


@dataclass(frozen=True, eq=False)
class Shift:
    """The state moved along the donor, as far as a turn by φ would move it: additive steering.

    Attributes:
        degrees: φ, a number or a tensor `[..., 1]`.

    Raises:
        ValueError: a dose that is not finite; when called, another width or a donor of norm 0.
    """

    degrees: Dose

    def __post_init__(self) -> None:
        _check_dose(self.degrees)

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return h′ = h + 2 ‖h‖ sin(φ/2) · donor / ‖donor‖."""
        _check_width(state, donor)
        wide = _wide(state)
        return (wide + chord(wide, self.degrees) * unit(_wide(donor))).to(state.dtype)


@dataclass(frozen=True, eq=False)
class ExchangeSubspace:
    """The donor's part inside a subspace, the state's own part outside it; or the reverse.

    With P the projection onto the span of the rows B of `basis`, P = BᵀB. Computed in float64,
    returned in the state's dtype.

    Attributes:
        basis: orthonormal rows `[k, d_model]`.
        complement: exchange what is outside the subspace instead.

    Raises:
        ValueError: rows that are not orthonormal; when called, another width.
    """

    basis: Tensor
    complement: bool = False

    def __post_init__(self) -> None:
        rows = self.basis.double() if self.basis.device.type != "mps" else self.basis
        if rows.dim() != 2 or not 0 < len(rows) <= rows.shape[1]:
            raise ValueError(
                f"A basis must be [k, d_model] with 1 ≤ k ≤ d_model, got {list(self.basis.shape)}."
            )
        excess = (rows @ rows.mT - torch.eye(len(rows)).to(rows)).abs().max()
        if not bool(excess < _ORTHONORMAL):
            raise ValueError(
                f"The {len(rows)} rows of a basis must be orthonormal; their products are up to "
                f"{float(excess):.1e} off. Take them from torch.linalg.qr or svd."
            )

    def __call__(self, state: Tensor, donor: Tensor) -> Tensor:
        """Return h′ = h + P (h_donor − h), or h_donor − P (h_donor − h) for the complement."""
        _check_width(state, donor)
        _check_width(state, self.basis)
        wide, given = _wide(state), _wide(donor)
        rows = self.basis.to(wide)
        inside = (given - wide) @ rows.mT @ rows
        return (given - inside if self.complement else wide + inside).to(state.dtype)


def apply_edit(
    edit: Edit, state: Tensor, donor: Tensor, who: str, item_of: Callable[[int], str]
) -> Tensor:
    """Return `edit(state, donor)`, a finite tensor of the state's shape, dtype and device.

    Args:
        edit: the edit.
        state: `[..., d_model]`.
        donor: of the same shape.
        who: what a message calls the edit.
        item_of: what a message calls a state, by its index among all `[...]`.

    Raises:
        ValueError: the edit refused, or returned something else.
    """
    try:
        changed = edit(state, donor)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
    if not isinstance(changed, Tensor):
        raise ValueError(f"{who} returned {type(changed).__name__}; an edit returns a tensor.")
    if changed.shape != state.shape:
        raise ValueError(
            f"{who} returned shape {tuple(changed.shape)} for states of shape "
            f"{tuple(state.shape)} ({item_of(0)} is the first); an edit keeps the shape."
        )
    for kind in ("dtype", "device"):
        if (found := getattr(changed, kind)) != (own := getattr(state, kind)):
            raise ValueError(
                f"{who} returned {kind} {found} for {item_of(0)}, whose state has {own}; end it "
                "with .to(state)."
            )
    finite = torch.isfinite(changed).all(dim=-1).reshape(-1)
    if not bool(finite.all()):
        raise ValueError(
            f"{who} returned NaN or infinity for {item_of(int(finite.int().argmin()))}; an edit "
            "returns finite states."
        )
    return changed


def norm(state: Tensor) -> Tensor:
    """Return ‖h‖₂ `[..., 1]`."""
    return state.norm(dim=-1, keepdim=True)


def unit(state: Tensor) -> Tensor:
    """Return h / ‖h‖₂ `[..., d_model]`; ValueError for a zero vector, which has no direction."""
    length = norm(state)
    _check_zero(length)
    return state / length


def across(state: Tensor, target: Tensor) -> Tensor:
    """Return the unit vector orthogonal to the state, in the plane of both, on the target's side.

    Raises:
        ValueError: the two are parallel or antiparallel, so that the plane is undefined.
    """
    u, t = unit(state), unit(target)
    part = t - (u * t).sum(-1, keepdim=True) * u
    sine = norm(part)
    if bool((sine < _LEAST_SINE).any()):
        item = int((sine.reshape(-1) < _LEAST_SINE).nonzero()[0])
        raise ValueError(
            f"State {item} and its target are parallel or antiparallel, so they span no plane to "
            "rotate in; choose another target."
        )
    return part / sine


def chord(state: Tensor, degrees: Dose) -> Tensor:
    """Return how far a turn by φ moves a state: 2 ‖h‖ sin(φ/2), `[..., 1]`."""
    return 2 * norm(state) * (_radians(degrees, state) / 2).sin()


def angle_degrees(state: Tensor, target: Tensor) -> Tensor:
    """Return θ(h, target) in degrees, `[...]`, float64, accurate at small angles too.

    Raises:
        ValueError: another width or a zero vector.
    """
    _check_width(state, target)
    u, v = unit(_wide(state)), unit(_wide(target))
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))


def _turn(state: Tensor, donor: Tensor, radians: Tensor) -> Tensor:
    _check_width(state, donor)
    wide = _wide(state)
    angle = radians.to(wide)
    turned = angle.cos() * unit(wide) + angle.sin() * across(wide, _wide(donor))
    return (norm(wide) * turned).to(state.dtype)


def _wide(state: Tensor) -> Tensor:
    """Return the state in float64, or in float32 where the device has no float64."""
    return state.to(torch.float32 if state.device.type == "mps" else torch.float64)


def _radians(degrees: Dose, like: Tensor) -> Tensor:
    wide = _wide(like)
    return torch.deg2rad(torch.as_tensor(degrees, dtype=wide.dtype, device=wide.device))


def _check_dose(degrees: Dose) -> None:
    if not bool(torch.isfinite(torch.as_tensor(degrees)).all()):
        raise ValueError(f"A dose must be a finite angle in degrees, got {degrees}.")


def _check_zero(length: Tensor) -> None:
    if bool((length == 0).any()):
        raise ValueError("A state of norm 0 has no direction; leave it out of the edit.")


def _check_width(state: Tensor, donor: Tensor) -> None:
    if state.shape[-1] != donor.shape[-1]:
        raise ValueError(
            f"The donor is {donor.shape[-1]} wide, the state {state.shape[-1]}; both must be "
            "residual streams of one model."
        )
