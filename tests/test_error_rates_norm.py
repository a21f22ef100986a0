"""How often the norm code's verdicts are wrong where the truth is known."""

import numpy as np
from scipy.spatial.distance import pdist, squareform

from lib.evidence.criteria import criteria
from lib.science.correlation import correlate
from lib.science.decoding import decoding_gain
from lib.science.estimate import Estimate

WITHIN = next(one for one in criteria("norm-code") if one.statistic == "partial_given_angle")


def test_an_absence_is_falsely_supported_or_refuted_at_the_margin_in_five_per_cent_at_most():
    """At a true partial correlation of just the margin, each verdict is an error."""
    rng = np.random.default_rng(0)
    weight = _weight(WITHIN.threshold)
    verdicts = []
    for run in range(200):
        norm, turn = rng.normal(size=(2, 80, 1))
        divergence = np.abs(rng.normal(size=(80, 80)))
        divergence = squareform(
            pdist(turn)
            + weight * pdist(norm)
            + 1.0 * squareform(np.triu(divergence, 1) + np.triu(divergence, 1).T, checks=False)
        )
        found = correlate(
            [squareform(pdist(norm))], divergence, f"texts {run}", given=[[squareform(pdist(turn))]]
        )
        interval = found.interval(WITHIN.level)
        verdicts.append(WITHIN.verdict(float(interval.low[0]), float(interval.high[0])))
    assert verdicts.count("supported") <= 0.07 * len(verdicts)  # 5 % and two standard errors
    assert verdicts.count("refuted") <= 0.07 * len(verdicts)


def _weight(wanted: float) -> float:
    """Return the weight of the norm's difference at which the partial ρ is `wanted`."""
    rng = np.random.default_rng(1)
    low, high = 0.0, 2.0
    norm, turn = rng.normal(size=(2, 700, 1))
    noise = np.abs(rng.normal(size=700 * 699 // 2))
    for _ in range(12):
        middle = (low + high) / 2
        found = _partial(pdist(norm), pdist(turn) + middle * pdist(norm) + noise, pdist(turn))
        low, high = (middle, high) if found < wanted else (low, middle)
    return (low + high) / 2


def _partial(first: np.ndarray, second: np.ndarray, given: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(one)).astype(float) for one in (first, second, given)]
    r = np.corrcoef(ranks)
    return float((r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)))


def test_an_attribute_that_the_norm_does_not_carry_is_seldom_found():
    """The better of two nulls, as the claim takes it, with labels that mean nothing."""
    rng = np.random.default_rng(2)
    supported = 0
    for run in range(120):
        gains = []
        for name in range(2):
            features, label = rng.normal(size=(180, 2)), np.tile(np.arange(3), 60)
            unit = np.repeat(np.arange(60), 3)
            found = decoding_gain(features, label, unit, rng, strata=unit)
            gains.append(found.over_units(unit, f"subjects {run} {name}"))
        best = max(gains, key=float)
        assert isinstance(best, Estimate)
        supported += bool(best.interval().low > 0)
    assert supported <= 0.09 * 120  # two chances of 2.5 % each, and two standard errors
