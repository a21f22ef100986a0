"""Edits: what an intervention does to a residual stream, as pure functions of state and donor.

Every edit takes states and donors `[..., d_model]` and returns new states of the same shape; block
and position belong to the sweep. The donor is another prompt's state, or a vector to act with.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
