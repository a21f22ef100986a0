"""Decoding: what a few numbers tell about a label, cross-validated, beyond shuffled labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler

from lib.science.estimate import Estimate, Measured, Untested, mean_over_units, means_by_unit

FloatArray = NDArray[np.float64]

N_FOLDS = 5
N_SHUFFLES = 40
FEWEST_ITEMS = 10
"""Items that the rarest class must have on average; fewer cannot be told from chance."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """What was decoded of each item's label.

    Attributes:
        gain: whether it was, less how often a shuffled label was `[n_items]`; 0 on average where
            nothing can be decoded.
        null_spread: the standard deviation over the shuffles of the share decoded.
    """

    gain: FloatArray
    null_spread: float

    def over_units(self, unit: ArrayLike, units: str) -> Measured:
        """Return the mean gain over units, never surer than shuffled labels are of theirs.

        Items that are tested in turn share most of what was fitted, so a bootstrap over units alone
        is too narrow (Bengio and Grandvalet 2004, JMLR 5): its draws are spread to the null's.
        """
        found = mean_over_units(means_by_unit(self.gain, unit), units)
        if isinstance(found, Untested):
            return found
        narrow = float(found.draws.std())
        wider = max(1.0, self.null_spread / narrow) if narrow else 1.0
        draws = found.value + (found.draws - found.value) * wider
        return Estimate(draws, found.units, found.n_units, n_least=found.n_least)


def decoding_gain(
    features: ArrayLike,
    labels: Sequence[object] | NDArray[np.generic],
    groups: Sequence[object] | NDArray[np.generic],
    rng: np.random.Generator,
    *,
    strata: Sequence[object] | NDArray[np.generic] | None = None,
) -> Decoded | Untested:
    """Return, for each item, whether its label was decoded less how often a shuffled one was.

    Ridge regression of the class indicators on cubic splines of each feature, fitted on all folds
    but one; the largest value wins. A group is never split between folds. The null is the same
    procedure with the labels shuffled, on the same folds.

    Args:
        features: `[n_items, n_features]`.
        labels: the class of each item `[n_items]`.
        groups: items that must not straddle folds `[n_items]`.
        rng: source of the shuffles.
        strata: labels are shuffled within these alone `[n_items]`; over all items by default.

    Returns:
        The gains; Untested for one class, fewer than ten items a class, fewer groups than folds, or
        features that are all equal.
    """
    table = np.asarray(features, dtype=np.float64)
    classes, label = np.unique(np.asarray(labels), return_inverse=True)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(classes) < 2:
        return Untested("one class alone")
    if len(label) < FEWEST_ITEMS * len(classes):
        return Untested(f"{len(label)} items in {len(classes)} classes, ten a class are needed")
    if len(names) < N_FOLDS:
        return Untested(f"{len(names)} groups, {N_FOLDS} are needed")
    if not np.ptp(table, axis=0).all():
        return Untested("a feature is the same for all items")
    stratum = np.zeros(len(label)) if strata is None else np.asarray(strata)
    shuffled = [_shuffle(label, stratum, rng) for _ in range(N_SHUFFLES)]
    hits = np.zeros((1 + N_SHUFFLES, len(label)))
    indicators = np.stack([np.eye(len(classes))[one] for one in (label, *shuffled)])
    for fitted, held in GroupKFold(N_FOLDS).split(table, groups=group):
        model = make_pipeline(StandardScaler(), SplineTransformer(n_knots=5), Ridge(alpha=1.0))
        targets = indicators[:, fitted].transpose(1, 0, 2).reshape(len(fitted), -1)
        found = model.fit(table[fitted], targets).predict(table[held])
        choice = found.reshape(len(held), 1 + N_SHUFFLES, len(classes)).argmax(-1).T
        hits[:, held] = choice == np.stack([label, *shuffled])[:, held]
    null = hits[1:]
    return Decoded(hits[0] - null.mean(axis=0), float(null.mean(axis=1).std(ddof=1)))


def _shuffle(
    label: NDArray[np.int64], stratum: NDArray[np.generic], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the labels shuffled within each stratum."""
    drawn = np.lexsort((rng.random(len(label)), stratum))
    result = np.empty_like(label)
    result[np.argsort(stratum, kind="stable")] = label[drawn]
    return result


def residuals(values: ArrayLike, nuisances: ArrayLike) -> FloatArray:
    """Return what a least-squares fit on the nuisances leaves of values, both `[n_items, …]`."""
    design = np.asarray(nuisances, dtype=np.float64)
    table = np.asarray(values, dtype=np.float64)
    left: FloatArray = table - LinearRegression().fit(design, table).predict(design)
    return left


def thirds(values: ArrayLike) -> NDArray[np.int64]:
    """Return in which third of the items each value lies, 0, 1 or 2 `[n_items]`."""
    ranks = np.argsort(np.argsort(np.asarray(values), kind="stable"), kind="stable")
    result: NDArray[np.int64] = ranks * 3 // len(ranks)
    return result
