"""Correlations with the divergence of predictions at every block, their intervals and tests.

All statistics are Spearman's ρ over pairs within a stratum (a template; contexts are one stratum),
averaged over strata. A bootstrap draw weighs the units, the same in all strata, blocks, measures
and models, so that every difference is paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lib.angular_code.geometry import Geometry, same_last_token, variant_angles
from lib.science.correlations import correlations_of_pairs, partial_correlation, rank_matrix
from lib.science.mantel import permutation_p_value, permuted_correlations
from lib.science.metrics import token_set_distances
from lib.science.stats import Interval, bootstrap_weights, holm, percentile_interval

FloatArray = NDArray[np.float64]

TARGET = "prediction"


class Measure(NamedTuple):
    """A correlation of one dissimilarity with that of the predictions, J.

    ``matrix`` and ``given`` name matrices; those that are given are partialled out.
    """

    name: str
    matrix: str
    given: tuple[str, ...] = ()


ANGLE = Measure("angle", "angle")
BEYOND_LENS = Measure("angle beyond the lens", "angle", ("lens",))
MEASURES = (
    ANGLE,
    Measure("distance", "distance"),
    Measure("norm", "norm"),
    Measure("logit lens", "lens"),
    BEYOND_LENS,
)


@dataclass(frozen=True, eq=False)
class DepthCorrelations:
    """Correlations at every block: estimate and bootstrap draws.

    Attributes:
        task: the task's name.
        model: the model's name.
        untrained: whether it is the untrained twin.
        n: independent units.
        values: by measure, ``[1 + n_draws, n_blocks]``; row 0 is the estimate. NaN where a measure
            is undefined: given the lens at the last block, whose lens is the prediction itself,
            or wherever else the lens leaves nothing over; and in draws of too few different units.
    """

    task: str
    model: str
    untrained: bool
    n: int
    values: Mapping[str, FloatArray]

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return next(iter(self.values.values())).shape[1]

    def mean(self, name: str, blocks: Sequence[int]) -> FloatArray:
        """Return the mean over blocks, ``[1 + n_draws]``; the first is the estimate.

        Raises:
            ValueError: no blocks, a measure that does not exist, or one undefined at a block.
        """
        if name not in self.values:
            raise ValueError(f"No measure {name!r}; choose one of: {', '.join(self.values)}.")
        if not len(blocks):
            raise ValueError("no blocks to average over")
        means: FloatArray = self.values[name][:, list(blocks)].mean(axis=1)
        if not np.isfinite(means[0]):
            raise ValueError(f"{name} is undefined at one of the blocks {list(blocks)}")
        return means

    def interval(self, values: FloatArray) -> Interval:
        """Return the interval of ``[1 + n_draws]`` values made from these correlations.

        Raises:
            ValueError: too many draws without a value (of too few different units).
        """
        return percentile_interval(float(values[0]), values[1:], n=self.n)

    def to_frame(self) -> pd.DataFrame:
        """Return a row per measure (``curve``) and block at which it has an interval."""
        rows = []
        for name, values in self.values.items():
            for block in np.flatnonzero(np.isfinite(values[0])):
                try:
                    found = self.interval(values[:, block])
                except ValueError:
                    continue  # Too few units: too many draws of too few different ones.
                rows.append((name, int(block), found.estimate, found.low, found.high))
        frame = pd.DataFrame(rows, columns=["curve", "block", "estimate", "low", "high"])
        return frame.assign(model=self.model, untrained=self.untrained, task=self.task, n=self.n)


def correlate_with_predictions(
    geometry: Geometry,
    weights: FloatArray,
    *,
    measures: Sequence[Measure] = MEASURES,
    extra: Mapping[str, FloatArray] | None = None,
) -> DepthCorrelations:
    """Return the correlations of dissimilarities with the divergence of predictions, by block.

    Args:
        geometry: the matrices of one model.
        weights: bootstrap weights of the units ``[n_draws, n_units]``.
        measures: which correlations.
        extra: further matrices that measures name, ``[n_blocks, n_items, n_items]``, or
            ``[n_items, n_items]`` for the same at all blocks.

    Raises:
        ValueError: weights for another number of units; a matrix that is constant in a stratum,
            or fewer than three items in one: the message says which, and no number comes back.
    """
    items = geometry.items
    if weights.ndim != 2 or weights.shape[1] != items.n_units:
        raise ValueError(
            f"{items.task}: weights must be [n_draws, {items.n_units}]; got {weights.shape}."
        )
    rows = np.concatenate([np.ones((1, items.n_units)), weights])[:, items.units]
    names = sorted({name for measure in measures for name in (measure.matrix, *measure.given)})
    pairs = _needed_pairs(measures, names)
    values = {measure.name: np.zeros((len(rows), geometry.n_blocks)) for measure in measures}
    strata = [np.flatnonzero(items.strata == stratum) for stratum in np.unique(items.strata)]
    for members in strata:
        square = np.ix_(members, members)
        target = _ranked(geometry.prediction[square], TARGET, items.task)
        n_different = (rows[:, members] > 0).sum(axis=1)
        drawn = np.where(n_different[:, None] < 3, 1.0, rows[:, members])  # Made NaN below.
        for block in range(geometry.n_blocks):
            ranked = [
                _ranked(_matrix(geometry, name, block, extra)[square], name, items.task, block)
                for name in names
            ]
            found = correlations_of_pairs([*ranked, target], pairs, drawn)
            table = {pair: found[:, column] for column, pair in enumerate(pairs)}
            for measure in measures:
                one = _value(measure, names, table, last=block == geometry.n_blocks - 1)
                # Three items are three pairs: with one matrix given, their ρ is 1 or −1 always.
                one[n_different < 3 + len(measure.given)] = np.nan
                values[measure.name][:, block] += one / len(strata)
    return DepthCorrelations(items.task, geometry.model, geometry.untrained, items.n_units, values)


def mantel_by_depth(
    geometry: Geometry,
    *,
    n_permutations: int,
    rng: np.random.Generator,
    measures: Sequence[Measure] = (ANGLE, BEYOND_LENS),
) -> pd.DataFrame:
    """Return the Mantel test of each measure at every block but the last, Holm's over blocks.

    The units' predictions are permuted, the same in all strata, and the mean over strata is the
    statistic; two-sided. A measure may have one given matrix.

    Returns:
        Columns `model`, `untrained`, `task`, `curve`, `block`, `estimate`, `null_low`,
        `null_high` (2.5 % and 97.5 % under permutation), `p_value`, `p_holm`, `n`.

    Raises:
        ValueError: as `correlate_with_predictions`.
    """
    items = geometry.items
    keys = rng.random((n_permutations, items.n_units))
    strata = [np.flatnonzero(items.strata == stratum) for stratum in np.unique(items.strata)]
    blocks = range(geometry.n_blocks - 1)  # The last is never counted.
    frames = []
    for measure in measures:
        observed = np.zeros(len(blocks))
        null = np.zeros((n_permutations, len(blocks)))
        for members in strata:
            square = np.ix_(members, members)
            firsts, *given = (
                [_matrix(geometry, name, block, None)[square] for block in blocks]
                for name in (measure.matrix, *measure.given)
            )
            one, permuted = permuted_correlations(
                firsts,
                geometry.prediction[square],
                np.argsort(keys[:, items.units[members]], axis=1),
                given=given[0] if given else None,
            )
            observed += one / len(strata)
            null += permuted / len(strata)
        p_values = [permutation_p_value(observed[b], null[:, b]) for b in blocks]
        low, high = np.quantile(null, [0.025, 0.975], axis=0)
        columns = {"block": list(blocks), "estimate": observed, "null_low": low, "null_high": high}
        frame = pd.DataFrame({**columns, "p_value": p_values, "p_holm": holm(p_values)})
        frames.append(frame.assign(curve=measure.name))
    return pd.concat(frames, ignore_index=True).assign(
        model=geometry.model, untrained=geometry.untrained, task=items.task, n=items.n_units
    )


def robustness(
    geometry: Geometry, *, n_draws: int, rng: np.random.Generator
) -> tuple[dict[str, DepthCorrelations], dict[str, str]]:
    """Return ρ(θ, J) and its increment over the lens in five variants, by the variant's name.

    Three change the states (`geometry.variant_angles`). ``same last token``: only the contexts
    that end in the most frequent last token. ``given word overlap``: the Jaccard distance of the
    token sets partialled out.

    Args:
        geometry: the matrices of one model.
        n_draws: bootstrap draws.
        rng: their source; with the same one, two models are paired.

    Returns:
        What could be measured, with measures `angle` and `angle beyond the lens`; and for each
        variant that could not, the reason.
    """
    weights = bootstrap_weights(geometry.items.n_units, n_draws, rng)
    subset_rng = np.random.default_rng(rng.integers(2**32))
    found: dict[str, DepthCorrelations] = {}
    reasons: dict[str, str] = {}
    try:
        angles = variant_angles(geometry)
        measures = [
            Measure(f"{kind}|{name}", name, given)
            for name in angles
            for kind, given in ((ANGLE.name, ()), (BEYOND_LENS.name, ("lens",)))
        ]
        both = correlate_with_predictions(geometry, weights, measures=measures, extra=angles)
        for name in angles:
            renamed = {
                kind: both.values[f"{kind}|{name}"] for kind in (ANGLE.name, BEYOND_LENS.name)
            }
            found[name] = DepthCorrelations(name, both.model, both.untrained, both.n, renamed)
    except ValueError as problem:
        reasons["changed states"] = str(problem)
    try:
        _, ends_alike = same_last_token(geometry.items)
        subset = geometry.select(ends_alike, task="same last token")
        drawn = bootstrap_weights(subset.items.n_units, n_draws, subset_rng)
        found["same last token"] = correlate_with_predictions(
            subset, drawn, measures=(ANGLE, BEYOND_LENS)
        )
    except ValueError as problem:
        reasons["same last token"] = str(problem)
    try:
        overlap = Measure(ANGLE.name, "angle", ("overlap",))
        beyond = Measure(BEYOND_LENS.name, "angle", ("lens", "overlap"))
        distance = {"overlap": token_set_distances(geometry.items.tokens)}
        result = correlate_with_predictions(
            geometry, weights, measures=(overlap, beyond), extra=distance
        )
        found["given word overlap"] = DepthCorrelations(
            "given word overlap", result.model, result.untrained, result.n, result.values
        )
    except ValueError as problem:
        reasons["given word overlap"] = str(problem)
    return found, reasons


def _matrix(
    geometry: Geometry, name: str, block: int, extra: Mapping[str, FloatArray] | None
) -> FloatArray:
    if extra and name in extra:
        return extra[name] if extra[name].ndim == 2 else extra[name][block]
    if name not in ("angle", "distance", "norm", "lens"):
        raise ValueError(f"No matrix {name!r}; give it as extra.")
    matrix: FloatArray = getattr(geometry, name)[block]
    return matrix


def _ranked(matrix: FloatArray, name: str, task: str, block: int | None = None) -> FloatArray:
    try:
        return rank_matrix(matrix)
    except ValueError as problem:
        where = "" if block is None else f" at block {block}"
        raise ValueError(f"{task}: {name}{where}: {problem}") from problem


def _needed_pairs(measures: Sequence[Measure], names: Sequence[str]) -> list[tuple[int, int]]:
    target = len(names)
    pairs = set()
    for measure in measures:
        variables = [names.index(name) for name in (measure.matrix, *measure.given)] + [target]
        pairs |= {(i, j) for i in variables for j in variables if i < j}
    return sorted(pairs)


def _value(
    measure: Measure,
    names: Sequence[str],
    table: Mapping[tuple[int, int], FloatArray],
    *,
    last: bool,
) -> FloatArray:
    """Return one measure at one block from the plain correlations, ``[1 + n_draws]``."""
    variables = [names.index(measure.matrix), len(names), *map(names.index, measure.given)]
    n_draws = len(next(iter(table.values())))
    if last and "lens" in measure.given:
        return np.full(n_draws, np.nan)
    matrix = np.ones((n_draws, len(variables), len(variables)))
    for row, i in enumerate(variables):
        for column, j in enumerate(variables):
            if i != j:
                matrix[:, row, column] = table[min(i, j), max(i, j)]
    return partial_correlation(matrix, determined="nan")
