"""Steering: edits of a residual stream with a direction and a dose, and the vectors to steer with.

The dose of every edit is an angle φ in degrees, and all edits of one dose move a state equally far:

    ‖h′ − h‖ = 2 ‖h‖ sin(φ/2),

the chord of a rotation by φ. What differs is the way: along the sphere towards a target (`rotate`),
along a fixed vector (`shift`), or outwards (`stretch`). Five lines steer any Hugging Face decoder:

    >>> decoder = load_decoder("embedded")
    >>> prompts = tokenize(decoder, ["The capital of France is", "The capital of Japan is"])
    >>> target = extract_residuals(decoder, prompts, blocks=[24]).states[0, 1]
    >>> with steer(decoder, 24, rotation(40), target, positions=[4]):  # lib.engine.generation
    ...     tokens = generate(decoder, prompts[:1], n_new_tokens=5)
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lib.engine.interventions import Edit, norm, unit
from lib.engine.models import Decoder

_LEAST_SINE = 1e-6
Dose = float | Tensor


def rotate(state: Tensor, target: Tensor, degrees: Dose) -> Tensor:
    """Return the state turned by φ towards the target, in the plane of both, its norm kept.

    h′ = ‖h‖ (u cos φ + v sin φ), with u = h / ‖h‖ and v the unit vector of the part of the target
    that is orthogonal to u. At φ = θ(h, target) the result points as the target does; beyond it,
    past the target. Computed in float64, returned in the state's dtype.

    Args:
        state: `[..., d_model]`.
        target: `[..., d_model]`, of which only the direction matters.
        degrees: φ, a number or a tensor `[..., 1]`.

    Raises:
        ValueError: another width, a zero vector, or a target parallel or antiparallel to its state.
    """
    _check_width(state, target)
    wide = _wide(state)
    angle = _radians(degrees, wide)
    turned = angle.cos() * unit(wide) + angle.sin() * across(wide, _wide(target))
    return (norm(wide) * turned).to(state.dtype)


def shift(state: Tensor, vector: Tensor, degrees: Dose) -> Tensor:
    """Return the state moved along a vector, as far as a rotation by φ would move it.

    h′ = h + 2 ‖h‖ sin(φ/2) · v / ‖v‖: additive steering at equal L2 displacement. Shapes, dtype and
    errors as `rotate`, but any vector other than zero will do.
    """
    _check_width(state, vector)
    wide = _wide(state)
    return (wide + chord(wide, degrees) * unit(_wide(vector))).to(state.dtype)


def stretch(state: Tensor, degrees: Dose) -> Tensor:
    """Return the state made longer by as much as a rotation by φ would move it.

    h′ = h (1 + 2 sin(φ/2)): the radial edit. It goes outwards, since inwards it would pass zero at
    60°.
    """
    wide = _wide(state)
    return (wide + chord(wide, degrees) * unit(wide)).to(state.dtype)


def rotation(degrees: Dose) -> Edit:
    """Return `rotate` by φ as an edit of state and donor, for a sweep or for `steer`."""
    return lambda state, donor: rotate(state, donor, degrees)


def shifting(degrees: Dose) -> Edit:
    """Return `shift` at dose φ as an edit of state and donor."""
    return lambda state, donor: shift(state, donor, degrees)


def stretching(degrees: Dose) -> Edit:
    """Return `stretch` at dose φ as an edit; the donor plays no part."""
    return lambda state, _donor: stretch(state, degrees)


def chord(state: Tensor, degrees: Dose) -> Tensor:
    """Return how far a rotation by φ moves a state: 2 ‖h‖ sin(φ/2), `[..., 1]`."""
    return 2 * norm(state) * (_radians(degrees, state) / 2).sin()


def angle_degrees(state: Tensor, target: Tensor) -> Tensor:
    """Return θ(h, target) in degrees, `[...]`, float64, accurate at small angles too.

    Raises:
        ValueError: another width or a zero vector.
    """
    _check_width(state, target)
    u, v = unit(_wide(state)), unit(_wide(target))
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))


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


def held_out_centroids(
    states: Tensor,
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    wanted: Sequence[int] | np.ndarray,
    held_out: Sequence[int] | np.ndarray,
    usable: np.ndarray | None = None,
) -> Tensor:
    """Return, for each case, the mean state of a label outside one group.

    With templates as groups this is leave-one-template-out: a case of template g is steered with
    what the other templates say of its target.

    Args:
        states: `[n_blocks, n_prompts, d_model]`.
        labels: each prompt's label, its answer for one `[n_prompts]`.
        groups: each prompt's group, such as its template `[n_prompts]`.
        wanted: the label of each case `[n_cases]`.
        held_out: the group that each case leaves out `[n_cases]`.
        usable: which prompts may be used `[n_prompts]`, all by default.

    Returns:
        `[n_blocks, n_cases, d_model]`.

    Raises:
        ValueError: a case for which no prompt is left.
    """
    label, group = np.asarray(labels), np.asarray(groups)
    allowed = np.ones(len(label), dtype=bool) if usable is None else np.asarray(usable, dtype=bool)
    keys = list(zip(np.asarray(wanted).tolist(), np.asarray(held_out).tolist(), strict=True))
    means: dict[tuple[int, int], Tensor] = {}
    for key in dict.fromkeys(keys):
        chosen = np.flatnonzero(allowed & (label == key[0]) & (group != key[1]))
        if len(chosen) == 0:
            raise ValueError(
                f"No usable prompt of label {key[0]} lies outside group {key[1]}; leave the case "
                "out."
            )
        means[key] = states[:, chosen].mean(dim=1)
    return torch.stack([means[key] for key in keys], dim=1)


def unembedding_direction(
    decoder: Decoder, states: Tensor, targets: Sequence[int], sources: Sequence[int]
) -> Tensor:
    """Return the direction in which the target's logit gains most on the source's.

    ∇_h [z_target(h) − z_source(h)], z the logit lens: the difference of two rows of the unembedding
    pulled back through the final norm at each state. To first order no other direction of the same
    length does more to that difference at the output.

    Args:
        decoder: the model.
        states: `[n, d_model]`.
        targets: token ids `[n]`.
        sources: token ids `[n]`.

    Raises:
        ValueError: shapes that do not fit, or a target equal to its source.
    """
    if not len(states) == len(targets) == len(sources):
        raise ValueError(
            f"{len(states)} states, {len(targets)} targets and {len(sources)} sources; give one "
            "target and one source for each state."
        )
    rows = [torch.as_tensor(np.asarray(ids)).tolist() for ids in (targets, sources)]
    if same := [token for token, other in zip(*rows, strict=True) if token == other]:
        raise ValueError(f"Token {same[0]} is both target and source; nothing can be gained.")
    (target, _), (source, _) = (decoder.unembedding_rows(tokens) for tokens in rows)
    difference = (target - source).detach()
    with torch.enable_grad():
        free = states.detach().clone().to(difference).requires_grad_(True)
        gain = (decoder.final_norm(free) * difference).sum()
        (gradient,) = torch.autograd.grad(gain, free)
    return gradient.to(states)


def _check_width(state: Tensor, donor: Tensor) -> None:
    if state.shape[-1] != donor.shape[-1]:
        raise ValueError(
            f"The donor is {donor.shape[-1]} wide, the state {state.shape[-1]}; both must be "
            "residual streams of one model."
        )


def _wide(state: Tensor) -> Tensor:
    """Return the state in float64, or in float32 where the device has no float64."""
    return state.to(torch.float32 if state.device.type == "mps" else torch.float64)


def _radians(degrees: Dose, like: Tensor) -> Tensor:
    angle = torch.as_tensor(degrees, dtype=like.dtype, device=like.device)
    if not bool(torch.isfinite(angle).all()):
        raise ValueError(f"A dose must be a finite angle in degrees, got {degrees}.")
    return angle * (math.pi / 180)
