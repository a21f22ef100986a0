"""How often the norm code's verdicts are wrong where the truth is known."""

import numpy as np
from scipy.spatial.distance import pdist, squareform

from lib.evidence.criteria import criteria
from lib.science.correlation import correlate
from lib.science.decoding import decoding_gain
from lib.science.estimate import Estimate

WITHIN = next(one for one in criteria("norm-code") if one.statistic == "partial_given_angle")


def test_an_absence_is_falsely_supported_or_refuted_at_the_margin_in_five_per_cent_at_most(told):
    """At a true partial correlation of just the margin, each verdict is an error."""
    verdicts = _absences(_weight(WITHIN.threshold), n_items=80, n_runs=200)
    errors = {
        "false_support": verdicts.count("supported") / 200,
        "false_refutation": verdicts.count("refuted") / 200,
    }
    seen = _absences(0.0, n_items=400, n_runs=20)  # none at all, and as many texts as the book's
    decided = seen.count("supported") / len(seen)
    told("norm-code", WITHIN.statistic, **errors, decided=decided)
    assert max(errors.values()) <= 0.07  # 5 % and two standard errors
    assert decided >= 0.9


def _absences(weight: float, *, n_items: int, n_runs: int) -> list[str]:
    rng = np.random.default_rng(0)
    verdicts = []
    for run in range(n_runs):
        norm, turn = rng.normal(size=(2, n_items, 1))
        divergence = np.abs(rng.normal(size=(n_items, n_items)))
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
    return verdicts


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


def test_an_attribute_that_the_norm_does_not_carry_is_seldom_found_and_one_it_does_mostly(told):
    """The better of two nulls, as the claim takes it, with labels that mean nothing."""
    supported, decided = _found(0.0, 120), _found(0.5, 20)
    for statistic in ("second_attribute_gain", "within_answer_gain"):
        told("norm-code", statistic, false_support=supported, decided=decided)
    assert supported <= 0.09  # two chances of 2.5 % each, and two standard errors
    assert decided >= 0.95


def _found(shift: float, n_runs: int) -> float:
    """The share of runs that find labels which move the first feature by so much each."""
    rng = np.random.default_rng(2)
    supported = 0
    for run in range(n_runs):
        gains = []
        for name in range(2):
            features, label = rng.normal(size=(180, 2)), np.tile(np.arange(3), 60)
            features[:, 0] += shift * label
            unit = np.repeat(np.arange(60), 3)
            found = decoding_gain(features, label, unit, rng, strata=unit)
            gains.append(found.over_units(unit, f"subjects {run} {name}"))
        best = max(gains, key=float)
        assert isinstance(best, Estimate)
        supported += bool(best.interval().low > 0)
    return supported / n_runs
