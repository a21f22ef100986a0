"""How often the verdicts on the inside of the switch are wrong where the truth is known.

Each run draws tasks of half their subjects, two pairs each, with a known transfer of what was
chosen on the others; and judges them as the chapter does. At each threshold at most 5 % of the runs
may support what is false, and at most 5 % refute what is true.
"""

import numpy as np
import pytest
from conftest import N_BOOKS
from scipy.stats import norm

from lib.claims import inside_the_switch as claim
from lib.evidence.criteria import POOLED, judge
from lib.evidence.transfer import Transfer

HALVES = (35, 38, 32, 33, 26, 34, 36, 31, 35, 23, 35, 30, 30, 26, 28, 6)
HELD_OUT = [f"task {number}" for number in range(len(HALVES))]
THRESHOLDS = {"attention_transfer": 0.8, "three_heads": 0.8, "three_heads_held_out": 0.5}


def draw_tasks(rng, truth, spread):
    """T of every task: subjects differ by 0.15, their pairs by 0.1, tasks about the truth."""
    shifts = spread * norm.ppf((np.arange(len(HALVES)) + 0.5) / len(HALVES))
    result = {}
    for name, n, shift in zip(HELD_OUT, HALVES, rng.permutation(shifts), strict=True):
        unit = np.repeat(np.arange(n), 2)[:48]
        before = rng.lognormal(1.0, 0.5, size=len(unit))
        own = truth + shift + 0.15 * rng.standard_normal(n)[unit]
        after = (1 - own - 0.1 * rng.standard_normal(len(unit))) * before
        zero = np.zeros(len(unit), dtype=int)
        transfer = Transfer(
            (0,), after[None], before, zero[None], zero, unit, f"subjects of {name}", 2 * n
        )
        estimate = transfer.estimate().at(0)
        result[name] = dict.fromkeys(("attention", "best 3", "elsewhere"), estimate)
    return result


def verdicts(truth, n_runs, spread=0.05):
    """The verdicts of runs, pooled over tasks, by statistic."""
    found = {statistic: [] for statistic in THRESHOLDS}
    for run in range(n_runs):
        runs = claim.statistics(draw_tasks(np.random.default_rng([23, run]), truth, spread))
        for row in judge(claim.CLAIM, "m", runs):
            if row["place"] == POOLED:
                found[row["statistic"]].append(row["verdict"])
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_at_a_threshold_few_runs_support_or_refute_by_chance(threshold, told):
    found, seen = verdicts(threshold, N_BOOKS), verdicts(threshold + 0.1, 40)
    for statistic in [name for name, own in THRESHOLDS.items() if own == threshold]:
        supported, refuted = (
            found[statistic].count(one) / N_BOOKS for one in ("supported", "refuted")
        )
        decided = seen[statistic].count("supported") / 40
        told(
            claim.CLAIM,
            statistic,
            false_support=supported,
            false_refutation=refuted,
            decided=decided,
        )
        assert supported <= 0.05 and refuted <= 0.05
        assert decided >= 0.95


def test_effects_of_the_size_seen_are_refuted_too():
    assert set(verdicts(0.7, 40)["three_heads"]) == {"refuted"}


def test_a_mean_that_hides_tasks_that_refute_it_is_not_supported():
    found = verdicts(0.84, 20, spread=0.4)
    assert "supported" not in found["attention_transfer"]
