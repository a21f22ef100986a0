"""Decoding: what a few numbers tell about a label, cross-validated, beyond shuffled labels."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler

from lib.science.estimate import Measured, Untested, mean_over_units, means_by_unit

FloatArray = NDArray[np.float64]

N_FOLDS = 5
N_SHUFFLES = 40
FEWEST_ITEMS = 10
"""Items that the rarest class must have on average; fewer cannot be told from chance."""


def no_surer(found: Measured, null_spread: float) -> Measured:
    """Return a mean gain, never surer than shuffled labels are of theirs.

    Items that are tested in turn share most of what was fitted, so a bootstrap over units alone is
    too narrow (Bengio and Grandvalet 2004, JMLR 5): its draws are spread to the null's, the
    standard deviation over the shuffles of the share decoded.
    """
    if isinstance(found, Untested):
        return found
    narrow = float(found.draws.std())
    wider = max(1.0, null_spread / narrow) if narrow else 1.0
    return replace(found, draws=found.value + (found.draws - found.value) * wider)


def decoding_gain(
    features: ArrayLike,
    labels: Sequence[object] | NDArray[np.generic],
    unit: ArrayLike,
    units: str,
    rng: np.random.Generator,
    *,
    strata: Sequence[object] | NDArray[np.generic] | None = None,
) -> Measured:
    """Return the share of items whose label was decoded less that of shuffled labels, over units.

    Ridge regression of the class indicators on cubic splines of each feature, fitted on all folds
    but one; the largest value wins. A unit is never split between folds. The null is the same
    procedure with the labels shuffled, on the same folds.

    Args:
        features: `[n_items, n_features]`.
        labels: the class of each item `[n_items]`.
        unit: of each item `[n_items]`; the mean gain is over units.
        units: what they are called.
        rng: source of the shuffles.
        strata: labels are shuffled within these alone `[n_items]`; over all items by default.

    Returns:
        The mean gain, 0 on average where nothing can be decoded; Untested for one class, fewer than
        ten items a class, fewer units than folds, or features that are all equal.
    """
    table = np.asarray(features, dtype=np.float64)
    classes, label = np.unique(np.asarray(labels), return_inverse=True)
    names, group = np.unique(np.asarray(unit), return_inverse=True)
    if len(classes) < 2:
        return Untested("one class alone")
    if len(label) < FEWEST_ITEMS * len(classes):
        return Untested(f"{len(label)} items in {len(classes)} classes, ten a class are needed")
    if len(names) < N_FOLDS:
        return Untested(f"{len(names)} units, {N_FOLDS} are needed")
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
    gain = means_by_unit(hits[0] - null.mean(axis=0), unit)
    return no_surer(mean_over_units(gain, units), float(null.mean(axis=1).std(ddof=1)))


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
    return table - LinearRegression().fit(design, table).predict(design)


def thirds(values: ArrayLike) -> NDArray[np.int64]:
    """Return in which third of the items each value lies, 0, 1 or 2 `[n_items]`."""
    ranks = np.argsort(np.argsort(np.asarray(values), kind="stable"), kind="stable")
    return ranks * 3 // len(ranks)
