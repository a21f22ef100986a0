"""Records of a claim with invented numbers, judged by the book's own criteria."""

from collections.abc import Mapping

import numpy as np

from lib.evidence.criteria import Record, criteria, judge
from lib.science.estimate import Measured, Untested, mean_over_units

TASKS = ("months-sequence", "capitals", "antonyms", "continents")


def number(value: float, units: str, spread: float = 0.01) -> Measured:
    """Return an estimate of 40 units close to a value."""
    noise = np.random.default_rng(3).normal(0, spread, 40)
    return mean_over_units(value + noise - noise.mean(), units)


def invented(
    claim: str, model: str = "m", *, met: bool = True, twins_met: bool = False
) -> list[Record]:
    """Return a claim's records on a model that meets every criterion, or none."""
    own = [one for one in criteria(claim) if not one.comparative]
    statistics = {one.statistic: _measured(one, met) for one in criteria(claim)}
    twins = {one.statistic: _measured(one, twins_met) for one in own}
    return judge(claim, model, statistics, twins=twins)


def _measured(one, met: bool) -> Measured | Mapping[str, Measured]:
    up = one.relation in (">=", ">")
    value = one.threshold + (0.3 if up == met else -0.3)
    if one.relation == "within":
        value = 0.0 if met else one.threshold + 0.3
    places: dict[str, Measured] = {}
    if "texts" in one.places:
        places["texts"] = number(value, "texts")
    if "tasks" in one.places:
        places |= {task: number(value, f"subjects of {task}") for task in TASKS}
        places[TASKS[-1]] = Untested("accuracy 0.31, 0.8 is needed")
    return places or number(value, "seeds")
