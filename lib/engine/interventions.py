"""Edits: what an intervention does to a residual stream, as pure functions of state and donor.

Every edit takes states and donors `[..., d_model]` and returns new states of the same shape; block
and position belong to the sweep. The donor is another prompt's state, or a vector to act with.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib.engine.recipes import by_recipe

Edit = Callable[[Tensor, Tensor], Tensor]


def exchange(state: Tensor, donor: Tensor) -> Tensor:
    """Return the donor's state: activation patching."""
    return donor.expand_as(state).clone()


def exchange_direction(state: Tensor, donor: Tensor) -> Tensor:
    """Return the donor's direction with the state's own norm: ‖h‖ · h_donor / ‖h_donor‖."""
    return unit(donor) * norm(state)


def exchange_norm(state: Tensor, donor: Tensor) -> Tensor:
    """Return the state's own direction with the donor's norm: ‖h_donor‖ · h / ‖h‖."""
    return unit(state) * norm(donor)


def add(state: Tensor, donor: Tensor) -> Tensor:
    """Return state + donor: additive steering, the donor being a steering vector."""
    return state + donor


def keep(state: Tensor, donor: Tensor) -> Tensor:  # noqa: ARG001 (every edit takes a donor)
    """Return the state unchanged: the control that must change nothing."""
    return state.clone()


def random_directions(states: Tensor, generator: torch.Generator) -> Tensor:
    """Return states `[..., d_model]` with the given norms and directions drawn uniformly at random.

    As donors of an exchange they are the control for "any state of that size would have done it".
    """
    drawn = torch.randn(states.shape, generator=generator).to(states)
    return unit(drawn) * norm(states)


def norm(state: Tensor) -> Tensor:
    """Return ‖h‖₂ `[..., 1]`."""
    return state.norm(dim=-1, keepdim=True)


def unit(state: Tensor) -> Tensor:
    """Return h / ‖h‖₂ `[..., d_model]`; ValueError for a zero vector, which has no direction."""
    length = norm(state)
    if bool((length == 0).any()):
        raise ValueError("A state of norm 0 has no direction; leave it out of the edit.")
    return state / length


@by_recipe
def scale(factor: float) -> Edit:
    """Return the edit h → c·h: norm times `factor`, direction kept; the donor plays no part.

    Its displacement ‖c·h − h‖ is |c − 1|·‖h‖.

    Raises:
        ValueError: a factor that is not positive and finite.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"A factor must be positive and finite, got {factor}.")

    def scaled(state: Tensor, donor: Tensor) -> Tensor:  # noqa: ARG001 (every edit takes a donor)
        return state * factor

    return scaled


@by_recipe
def rotate_by_displacement(displacement: float) -> Edit:
    """Return the edit that turns h towards the donor and keeps its norm, moving it a given way.

    In the plane of state and donor, by the angle φ = 2·arcsin(displacement / 2): the result is at
    distance `displacement`·‖h‖ from h. With displacement |c − 1| and a donor of random direction it
    is the match of `scale(c)`: the same distance, spent on direction alone. Vectors that keep their
    norm are at most 2‖h‖ apart, so larger displacements (c above 3) have no match.

    Raises:
        ValueError: a displacement outside (0, 2]; when applied, a donor parallel to the state.
    """
    if not 0 < displacement <= 2:
        raise ValueError(
            f"Displacement {displacement} cannot be reached: a rotation that keeps the norm moves "
            "a state by more than 0 and at most 2 of its norms."
        )
    angle = 2 * math.asin(displacement / 2)

    def rotated(state: Tensor, donor: Tensor) -> Tensor:
        u, v = unit(state.double()), unit(donor.double())
        across = v - (u * v).sum(-1, keepdim=True) * u
        if bool((norm(across) < 1e-6).any()):
            raise ValueError("A donor is parallel to its state: they span no plane to turn in.")
        turned = math.cos(angle) * u + math.sin(angle) * unit(across)
        return (turned * norm(state.double())).to(state.dtype)

    return rotated
