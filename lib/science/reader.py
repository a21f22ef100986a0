"""Affine reader: what of the last block's state can be read, linearly, from an earlier block's.

The logit lens reads every block as if it were the last one, and so reads middle blocks badly. A
ridge regression from a block's state to the last block's is a fairer reader (Belrose et al. 2023,
arXiv:2303.08112, train such a map by gradient descent): final norm and unembedding then turn what
it reads into a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

PENALTIES = tuple(10.0**power for power in np.arange(-7.0, 2.1, 0.5))
"""Tried on held-out texts, in units of the states' mean variance over the dimensions."""
HELD_OUT = 5
"""Every fifth text is held out to choose the penalty; the reader is then fitted on all."""


@dataclass(frozen=True, eq=False)
class Reader:
    """An affine map from a block's states to the last block's.

    Attributes:
        weights: `[d_model, d_model]`, float64.
        offset: `[d_model]`.
        penalty: the one chosen, in units of the states' mean variance.
        explained: the share of the last states' variance that is read on held-out texts, at most 1;
            below 0 their mean would have been nearer.
    """

    weights: FloatArray
    offset: FloatArray
    penalty: float
    explained: float

    def __call__(self, states: ArrayLike) -> FloatArray:
        """Return the last block's states as read from a block's, both `[n_items, d_model]`."""
        return np.asarray(states, dtype=np.float64) @ self.weights + self.offset


def fit_reader(
    states: ArrayLike,
    last_states: ArrayLike,
    texts: ArrayLike,
    *,
    penalties: Sequence[float] = PENALTIES,
) -> Reader:
    """Return the ridge regression of the last block's states on a block's.

    One eigendecomposition of the states' covariance serves all penalties: λ adds to its
    eigenvalues (Hastie, Tibshirani and Friedman 2009, section 3.4.1). The penalty is the one with
    the least squared error on texts that were held out whole.

    Args:
        states: of one block at many tokens `[n_positions, d_model]`.
        last_states: of the last block at the same tokens.
        texts: which text each token stands in `[n_positions]`.
        penalties: λ to choose from, in units of the states' mean variance.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, fewer texts than
            `HELD_OUT`, states that are all alike.
    """
    x, y = (np.asarray(given, dtype=np.float64) for given in (states, last_states))
    text = np.unique(np.asarray(texts), return_inverse=True)[1]
    if x.ndim != 2 or y.ndim != 2 or not len(x) == len(y) == len(text):
        raise ValueError(
            "A reader needs states and last states [n_positions, d_model] and a text for each "
            f"position; got {x.shape}, {y.shape} and {text.shape}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("A reader's states hold NaN or infinite values; leave those tokens out.")
    if not len(text) or text.max() + 1 < HELD_OUT:
        raise ValueError(
            f"A reader needs {HELD_OUT} texts or more, to hold one of each {HELD_OUT} out."
        )
    held_out = text % HELD_OUT == 0
    learned, judged = _Moments.of(x[~held_out], y[~held_out]), _Moments.of(x[held_out], y[held_out])
    errors, total = _Ridge.of(learned).errors(judged, penalties)
    best = int(np.argmin(errors))
    weights, offset = _Ridge.of(learned.joined(judged)).coefficients(penalties[best])
    return Reader(weights, offset, penalties[best], 1 - float(errors[best]) / total)


@dataclass(frozen=True, eq=False)
class _Moments:
    """What a regression needs of its data: sums of products about the means."""

    n: int
    mean_x: FloatArray
    mean_y: FloatArray
    xx: FloatArray  # [d_model, d_model]
    xy: FloatArray
    yy: float  # summed over the dimensions

    @classmethod
    def of(cls, x: FloatArray, y: FloatArray) -> _Moments:
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        x, y = x - mean_x, y - mean_y
        return cls(len(x), mean_x, mean_y, x.T @ x, x.T @ y, float(np.square(y).sum()))

    def about(self, mean_x: FloatArray, mean_y: FloatArray) -> _Moments:
        """Return the sums about other means."""
        dx, dy = self.mean_x - mean_x, self.mean_y - mean_y
        xx, xy = (part + self.n * np.outer(dx, d) for part, d in ((self.xx, dx), (self.xy, dy)))
        return _Moments(self.n, mean_x, mean_y, xx, xy, self.yy + self.n * float(dy @ dy))

    def joined(self, other: _Moments) -> _Moments:
        """Return those of both data sets together."""
        n = self.n + other.n
        mean_x, mean_y = (
            (self.n * one + other.n * its) / n
            for one, its in ((self.mean_x, other.mean_x), (self.mean_y, other.mean_y))
        )
        one, its = self.about(mean_x, mean_y), other.about(mean_x, mean_y)
        return _Moments(n, mean_x, mean_y, one.xx + its.xx, one.xy + its.xy, one.yy + its.yy)


@dataclass(frozen=True, eq=False)
class _Ridge:
    """The parts of a ridge regression that no penalty changes."""

    mean_x: FloatArray
    mean_y: FloatArray
    values: FloatArray  # eigenvalues of the covariance [d_model], over their mean
    vectors: FloatArray
    moments: FloatArray  # vectorsᵀ · covariance of x with y, over the same mean

    @classmethod
    def of(cls, data: _Moments) -> _Ridge:
        values, vectors = np.linalg.eigh(data.xx / data.n)
        scale = float(values.mean())
        if not scale > 0:
            raise ValueError("A reader's states are all alike; there is nothing to read from them.")
        moments = vectors.T @ data.xy / (data.n * scale)
        values = np.clip(values / scale, 0, None)
        return cls(data.mean_x, data.mean_y, values, vectors, moments)

    def errors(self, data: _Moments, penalties: Sequence[float]) -> tuple[FloatArray, float]:
        """Return the summed squared error on other data at each penalty, and of the mean alone.

        With D = 1 / (eigenvalues + penalty) and scores S of x, |S·D·moments − y|² is a quadratic
        form in D, so that a penalty costs d_model² and not n · d_model².
        """
        held = data.about(self.mean_x, self.mean_y)
        squares = (self.vectors.T @ held.xx @ self.vectors) * (self.moments @ self.moments.T)
        cross = ((self.vectors.T @ held.xy) * self.moments).sum(axis=1)
        shrunk = 1 / (self.values + np.asarray(penalties)[:, None])
        quadratic = np.einsum("pi,ij,pj->p", shrunk, squares, shrunk, optimize=True)
        found: FloatArray = quadratic - 2 * shrunk @ cross + held.yy
        return found, held.yy

    def coefficients(self, penalty: float) -> tuple[FloatArray, FloatArray]:
        weights: FloatArray = (self.vectors / (self.values + penalty)) @ self.moments
        return weights, self.mean_y - self.mean_x @ weights
