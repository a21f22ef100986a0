"""Sharp or gradual: a logistic curve, a straight line and a step, judged on prompts held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.science.logistic import fit_logistic
from lib.science.stats import Interval, bootstrap_difference, bootstrap_weights

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ShapeComparison:
    """Held-out log-likelihood (nats per pair and block) of three shapes, differences by prompt."""

    logistic: float
    line: float
    step: float
    logistic_over_line: Interval
    logistic_over_step: Interval
    n_folds: int
    n_prompts: int


def compare_shapes(
    outcome: ArrayLike,
    pairs: ArrayLike,
    *,
    falling: bool,
    rng: np.random.Generator,
    n_folds: int = 5,
    n_draws: int = 1000,
) -> ShapeComparison:
    """Return how well a logistic curve, a straight line and a step predict prompts held out.

    Prompts are dealt into folds. Each shape is fitted by least squares to the shares among pairs
    that have no prompt in the fold, and judged by the binomial log-likelihood of the pairs whose
    recipient is in it. Predicted shares s become (n·s + 1) / (n + 2), n the prompts fitted on, for
    all three alike: no shape may be certain.

    Args:
        outcome: ``[n_blocks, n_pairs]``, 0 or 1.
        pairs: ``[n_pairs, 2]`` prompts: recipient, donor; or ``[n_pairs]``, recipients alone.
        falling: Whether the arm falls with depth.
        rng: Deals the folds and draws the bootstrap.
        n_folds: Folds over prompts.
        n_draws: Bootstrap draws over recipients for the intervals.

    Raises:
        ValueError: Shapes that do not fit, outcomes other than 0 and 1, too few prompts.
    """
    flips = np.asarray(outcome, dtype=np.float64)
    members = np.asarray(pairs, dtype=np.int64).reshape(len(np.asarray(pairs)), -1)
    if flips.ndim != 2 or flips.shape[1] != len(members) or not np.isin(flips, (0, 1)).all():
        raise ValueError(f"outcome must be 0 or 1, [n_blocks, {len(members)}]; got {flips.shape}.")
    prompts, codes = np.unique(members, return_inverse=True)
    codes = codes.reshape(members.shape)
    if len(prompts) < 2 * n_folds:
        raise ValueError(f"{n_folds} folds need {2 * n_folds} prompts or more; got {len(prompts)}.")
    fold_of = rng.permutation(np.arange(len(prompts)) % n_folds)
    score = np.full((3, len(members)), np.nan)
    for fold in range(n_folds):
        inside = fold_of[codes] == fold
        train, test = ~inside.any(axis=1), inside[:, 0]
        if not train.any():
            raise ValueError(f"No pair is left to fit on without fold {fold}; use more folds.")
        n_fitted = len(np.unique(codes[train]))
        shapes = np.clip(_shapes(flips[:, train].mean(axis=1), falling), 0, 1)
        chance = (n_fitted * shapes + 1) / (n_fitted + 2)
        hits = flips[:, test]
        score[:, test] = (np.log(chance) @ hits + np.log1p(-chance) @ (1 - hits)) / len(flips)
    recipients, rows = np.unique(codes[:, 0], return_inverse=True)
    means = np.stack([np.bincount(rows, weights=s) / np.bincount(rows) for s in score])
    weights = bootstrap_weights(len(recipients), n_draws, rng)
    return ShapeComparison(
        logistic=float(means[0].mean()),
        line=float(means[1].mean()),
        step=float(means[2].mean()),
        logistic_over_line=bootstrap_difference(means[0], means[1], weights),
        logistic_over_step=bootstrap_difference(means[0], means[2], weights),
        n_folds=n_folds,
        n_prompts=len(prompts),
    )


def _shapes(curve: FloatArray, falling: bool) -> FloatArray:
    """Return the least-squares logistic curve, line and step of a curve, ``[3, n_blocks]``."""
    n_blocks = len(curve)
    blocks = np.arange(n_blocks)
    fit = fit_logistic(curve, falling=falling)
    line = np.polyval(np.polyfit(blocks, curve, 1), blocks)
    steps = [
        np.where(blocks < cut, curve[:cut].mean(), curve[cut:].mean()) for cut in range(1, n_blocks)
    ]
    step = min(steps, key=lambda candidate: float(np.square(curve - candidate).sum()))
    return np.stack([fit.at(blocks), line, step])
