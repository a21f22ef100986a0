"""Logistic curves over depth: least-squares fits of many curves at once.

A curve has one value a block, x = block number 0 … L − 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

FloatArray = NDArray[np.float64]

# From 10 % to 90 % of a logistic curve in units of its scale: 2·logit(0.9).
SCALES_10_90 = float(2 * np.log(9))
# One value a block cannot show a switch narrower than this (blocks): the narrowest curve fitted.
NARROWEST = 0.5

_START_SCALES = 12
_STEPS = 40
_DAMPING = 1e-3
_STIFFEST = 1e3  # no step this short gained anything: at the minimum
_GAIN = 1e-9  # of the squared error: a step that gains less is the last


@dataclass(frozen=True)
class LogisticFit:
    """Logistic curves: low + (high − low)·σ(±(block − centre) / scale), arrays of one shape."""

    low: FloatArray
    high: FloatArray
    centre: FloatArray  # blocks, within 0 … L − 1
    scale: FloatArray  # blocks; width between NARROWEST and L
    falling: bool
    n_blocks: int

    @property
    def width(self) -> FloatArray:
        """Depth between 10 % and 90 % of the change, in blocks: 2·ln 9·scale."""
        return SCALES_10_90 * self.scale

    @property
    def change(self) -> FloatArray:
        """Size of the fitted change between the first and the last block, at least 0."""
        result: FloatArray = np.abs(self.at(self.n_blocks - 1) - self.at(0))
        return result

    def at(self, block: ArrayLike) -> FloatArray:
        """Return the value of each curve at ``block`` (a number, or one a curve)."""
        slope = -1 if self.falling else 1
        place = slope * (np.asarray(block, dtype=np.float64) - self.centre) / self.scale
        result: FloatArray = self.low + (self.high - self.low) * expit(place)
        return result


def fit_logistic(
    curves: ArrayLike, *, falling: bool, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> LogisticFit:
    """Return the least-squares logistic curve of each row, fitted to all rows at once.

    Starts from the best of a grid of centres and scales and goes on by Levenberg-Marquardt steps in
    the four parameters, kept inside their bounds.

    Args:
        curves: ``[n_blocks]`` or ``[n_curves, n_blocks]``, at least four blocks.
        falling: Whether the curve falls with depth.
        bounds: Range of the asymptotes ``low`` and ``high``: (0, 1) for shares, (-1, 1) for
            correlations, None if free.

    Returns:
        Arrays of shape ``[]`` or ``[n_curves]``.

    Raises:
        ValueError: Fewer than four blocks, a value that is not finite.
    """
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim not in (1, 2) or values.shape[-1] < 4:
        raise ValueError(f"curves must be [n_curves, 4 blocks or more]; got {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("curves must be finite at every block.")
    n_blocks = values.shape[-1]
    rows = np.atleast_2d(values)
    lowest, highest = bounds or (-np.inf, np.inf)
    narrow, wide = np.log(NARROWEST / SCALES_10_90), np.log(n_blocks / SCALES_10_90)
    below = np.array([lowest, lowest, 0.0, narrow])
    above = np.array([highest, highest, n_blocks - 1.0, wide])
    parameters = _refine(rows, _start(rows, falling, below, above), falling, below, above)
    low, high, centre, log_scale = parameters.T.reshape(4, *values.shape[:-1])
    return LogisticFit(low, high, centre, np.exp(log_scale), falling, n_blocks)


def _start(rows: FloatArray, falling: bool, below: FloatArray, above: FloatArray) -> FloatArray:
    """Return each row's best (low, high, centre, log scale) on a grid of centres and scales."""
    n_blocks = rows.shape[1]
    centres, log_scales = np.meshgrid(
        np.linspace(below[2], above[2], 2 * n_blocks - 1),
        np.linspace(below[3], above[3], _START_SCALES),
    )
    centre, log_scale = centres.ravel(), log_scales.ravel()
    slope = -1 if falling else 1
    basis = expit(slope * (np.arange(n_blocks) - centre[:, None]) / np.exp(log_scale)[:, None])
    mean = basis.mean(axis=1)
    spread = np.square(basis - mean[:, None]).sum(axis=1)
    covariance = (rows - rows.mean(axis=1, keepdims=True)) @ (basis - mean[:, None]).T
    change = np.clip(covariance / spread, 0, None)
    low = np.clip(rows.mean(axis=1, keepdims=True) - change * mean, below[0], above[0])
    squares = np.square(basis).sum(axis=1)
    product = rows @ basis.T
    change = np.clip((product - low * basis.sum(axis=1)) / squares, 0, above[1] - low)
    error = (
        n_blocks * low**2
        + change**2 * squares
        + 2 * low * change * basis.sum(axis=1)
        - 2 * low * rows.sum(axis=1, keepdims=True)
        - 2 * change * product
    )
    best = error.argmin(axis=1)
    at = np.arange(len(rows))
    low, high = low[at, best], (low + change)[at, best]
    return np.stack([low, high, centre[best], log_scale[best]], axis=1)


def _refine(
    rows: FloatArray, start: FloatArray, falling: bool, below: FloatArray, above: FloatArray
) -> FloatArray:
    """Return the parameters after damped Gauss-Newton steps within the bounds, row by row.

    A row is finished when a step gains it next to nothing, or no step gains it anything.
    """
    blocks = np.arange(rows.shape[1])
    slope = -1 if falling else 1
    result = start.copy()
    active = np.arange(len(rows))
    values, parameters = rows, start.copy()
    damping = np.full(len(rows), _DAMPING)

    def curve(p: FloatArray) -> tuple[FloatArray, FloatArray]:
        place = slope * (blocks - p[:, 2:3]) * np.exp(-p[:, 3:4])
        return p[:, :1] + (p[:, 1:2] - p[:, :1]) * expit(place), place

    fitted, place = curve(parameters)
    error = np.square(values - fitted).sum(axis=1)
    for _ in range(_STEPS):
        share = expit(place)
        steep = (parameters[:, 1:2] - parameters[:, :1]) * share * (1 - share)
        jacobian = np.stack(
            [1 - share, share, -slope * steep * np.exp(-parameters[:, 3:4]), -steep * place], axis=2
        )
        gradient = ((values - fitted)[:, None, :] @ jacobian)[:, 0]
        # A parameter that its bound holds back is left out of the step.
        held = ((parameters <= below) & (gradient < 0)) | ((parameters >= above) & (gradient > 0))
        jacobian *= ~held[:, None, :]
        gradient *= ~held
        normal = jacobian.swapaxes(1, 2) @ jacobian
        diagonal = np.einsum("rpp->rp", normal)
        diagonal += damping[:, None] * (diagonal + 1e-9) + 1e-12 + held
        step = np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
        trial = np.clip(parameters + step, below, above)
        trial[:, 1] = np.maximum(trial[:, 0], trial[:, 1])
        trial_fitted, trial_place = curve(trial)
        trial_error = np.square(values - trial_fitted).sum(axis=1)
        better = trial_error < error
        finished = np.where(better, error - trial_error <= _GAIN * error, damping >= _STIFFEST)
        parameters[better] = trial[better]
        fitted[better], place[better] = trial_fitted[better], trial_place[better]
        error[better] = trial_error[better]
        damping = np.where(better, damping / 5, damping * 4)
        result[active] = parameters
        going = ~finished
        if not going.any():
            break
        active, values, parameters = active[going], values[going], parameters[going]
        fitted, place, error = fitted[going], place[going], error[going]
        damping = damping[going]
    return result
