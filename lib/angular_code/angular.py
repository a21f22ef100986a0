"""The angular code, task by task: windows of depth, correlations, and the verdicts they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lib.angular_code.depth import (
    ANGLE,
    BEYOND_LENS,
    DepthCorrelations,
    correlate_with_predictions,
    mantel_by_depth,
)
from lib.angular_code.geometry import Geometry, Items, measure_geometry
from lib.engine.models import Decoder
from lib.evidence.verdicts import early_blocks, judge, late_blocks, verdict_table
from lib.science.stats import bootstrap_weights

FloatArray = NDArray[np.float64]

CLAIM = "angular-code"
STATISTICS = {
    "late_angle_correlation": "ρ(θ, J), late",
    "late_minus_early_angle_correlation": "ρ(θ, J), late − early",
    "late_angle_minus_distance": "ρ(θ, J) − ρ(d, J), late",
    "late_angle_partial_correlation": "ρ(θ, J | lens), late",
    "late_angle_partial_minus_twin": "ρ(θ, J | lens), late, − twin",
}
"""The statistics of the claim, with the short names of figures and tables."""


@dataclass(frozen=True)
class Windows:
    """Which blocks are early and late; none where they cannot be told.

    Attributes:
        early: blocks L/4 to L/2, or empty.
        late: blocks ℓ* to L − 2, or empty.
        transition: the median of the tasks' ℓ* with the smallest and largest of them, or None.
        reason: why a window is empty, or an empty string.
    """

    early: Sequence[int]
    late: Sequence[int]
    transition: tuple[float, float, float] | None
    reason: str = ""


def find_windows(n_blocks: int, transitions: pd.DataFrame) -> Windows:
    """Return the early and late blocks of a model from its tasks' transitions.

    Args:
        n_blocks: L.
        transitions: a row per testable task with its ℓ* as `block`; may be empty.
    """
    try:
        early = early_blocks(n_blocks)
    except ValueError as problem:
        return Windows((), (), None, str(problem))
    if len(transitions) == 0:
        return Windows(early, (), None, "no task has a transition, so no block is late")
    places = transitions["block"].astype(float)
    found = (float(places.median()), float(places.min()), float(places.max()))
    try:
        return Windows(early, late_blocks(n_blocks, found[0]), found)
    except ValueError as problem:
        return Windows(early, (), found, str(problem))


def measure_sets(
    decoder: Decoder, sets: Mapping[str, Items]
) -> tuple[dict[str, Geometry], dict[str, str]]:
    """Return the geometry of each set of items, and the reason for each that has none."""
    found: dict[str, Geometry] = {}
    reasons: dict[str, str] = {}
    who = "untrained twin" if decoder.untrained else "trained model"
    for name, items in sets.items():
        try:
            found[name] = measure_geometry(decoder, items, description=f"{name}, {who}")
        except ValueError as problem:
            reasons[name] = str(problem)
    return found, reasons


def correlate_sets(
    geometries: Mapping[str, Geometry], *, n_draws: int, seed: int
) -> tuple[dict[str, DepthCorrelations], dict[str, str]]:
    """Return the correlations of each set at every block, and the reason for each without any.

    The draws of a set depend on the seed and the set's name alone, so the trained model and its
    twin are paired.
    """
    found: dict[str, DepthCorrelations] = {}
    reasons: dict[str, str] = {}
    for name, geometry in geometries.items():
        rng = np.random.default_rng([seed, *name.encode()])
        try:
            weights = bootstrap_weights(geometry.items.n_units, n_draws, rng)
            found[name] = correlate_with_predictions(geometry, weights)
        except ValueError as problem:
            reasons[name] = str(problem)
    return found, reasons


def mantel_sets(
    geometries: Mapping[str, Geometry], *, n_permutations: int, seed: int
) -> pd.DataFrame:
    """Return `depth.mantel_by_depth` of all sets in one table; sets without one left out."""
    frames = []
    for name, geometry in geometries.items():
        rng = np.random.default_rng([seed, *name.encode(), 1])
        try:
            frames.append(mantel_by_depth(geometry, n_permutations=n_permutations, rng=rng))
        except ValueError:
            continue  # Its reason is given where its correlations are missing.
    columns = ["task", "curve", "block", "untrained", "estimate", "p_holm"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def curves_table(*sets: Mapping[str, DepthCorrelations]) -> pd.DataFrame:
    """Return the correlations of all sets and models in one tidy table."""
    frames = [found.to_frame() for one in sets for found in one.values()]
    columns = ["curve", "block", "estimate", "low", "high", "model", "untrained", "task", "n"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def late_statistics(
    found: DepthCorrelations, windows: Windows, twin: DepthCorrelations | None = None
) -> dict[str, FloatArray]:
    """Return each statistic of the claim, ``[1 + n_draws]``, the estimate first.

    One that is undefined at one of the blocks is left out, and without ``twin`` the difference to
    it.

    Raises:
        ValueError: a window without blocks.
    """
    if not len(windows.late) or not len(windows.early):
        raise ValueError(windows.reason)
    late = found.mean(ANGLE.name, windows.late)
    values = {
        "late_angle_correlation": late,
        "late_minus_early_angle_correlation": late - found.mean(ANGLE.name, windows.early),
        "late_angle_minus_distance": late - found.mean("distance", windows.late),
    }
    try:
        beyond = found.mean(BEYOND_LENS.name, windows.late)
        values["late_angle_partial_correlation"] = beyond
        if twin is not None:
            difference = beyond - twin.mean(BEYOND_LENS.name, windows.late)
            values["late_angle_partial_minus_twin"] = difference
    except ValueError:
        pass  # The lens leaves nothing over at a block.
    return values


def judge_sets(
    decoder: Decoder,
    correlations: Mapping[str, DepthCorrelations],
    windows: Windows,
    reasons: Mapping[str, str],
    *,
    names: Sequence[str],
    twins: Mapping[str, DepthCorrelations] | None = None,
) -> pd.DataFrame:
    """Return the records of all statistics on all sets, for the trained model or its twin.

    Args:
        decoder: the model that was measured.
        correlations: what was found, by set.
        windows: the early and late blocks, those of the trained model for its twin as well.
        reasons: why a set is missing from ``correlations``.
        names: all sets, measured or not.
        twins: the untrained twin's correlations; None if ``decoder`` is the twin.
    """
    records = []
    for name in names:
        values: dict[str, FloatArray] = {}
        reason = reasons.get(name, "not measured")
        found, twin = correlations.get(name), (twins or {}).get(name)
        if found is not None:
            reason = "the lens leaves nothing over to be correlated, here or in the untrained twin"
            try:
                values = late_statistics(found, windows, twin)
            except ValueError as problem:
                reason = str(problem)
        for statistic in STATISTICS:
            interval, missing = None, reason
            if found and decoder.untrained and statistic == "late_angle_partial_minus_twin":
                missing = "the untrained twin is what the trained model is compared with"
            if found and statistic in values:
                try:
                    interval = found.interval(values[statistic])
                except ValueError:
                    missing = f"{found.n} subjects are too few for an interval"
            record = judge(
                CLAIM,
                statistic,
                task=name,
                model=decoder.name,
                untrained=decoder.untrained,
                estimate=interval.estimate if interval else None,
                low=interval.low if interval else None,
                high=interval.high if interval else None,
                n=found.n if found else 0,
                reason=None if interval else missing,
            )
            records.append(record)
    return verdict_table(records)
