"""By task: functions of the entries that were measured, and the reasons of those that were not."""

import numpy as np
import pytest

from lib.evidence.by_task import beyond_twins, both, each
from lib.science.estimate import Estimate, Untested, mean_over_units

FOUND = {"a": 1, "b": Untested("lost"), "c": 3}


def test_a_function_meets_what_was_found_and_reasons_stay():
    assert each(FOUND, lambda one: one + 1) == {"a": 2, "b": Untested("lost"), "c": 4}


def test_what_is_untested_in_either_stays_so_with_its_own_reason():
    others = {"d": 4, "c": Untested("short"), "b": Untested("flat"), "a": 10}
    expected = {"a": -9, "b": Untested("lost"), "c": Untested("short")}
    assert both(FOUND, others, lambda one, other: one - other) == expected


def number(value, name):
    noise = np.random.default_rng(len(name)).normal(size=30)
    return mean_over_units(value + 0.01 * (noise - noise.mean()), f"subjects of {name}")


def test_numbers_are_pooled_and_twins_subtracted_on_the_same_tasks():
    trained = {"x": number(0.3, "x"), "y": number(0.1, "y"), "z": number(0.9, "z")}
    twins = [
        {"x": number(0.05 + k, "x"), "y": number(0.01, "y"), "z": Untested("too few")}
        for k in (-0.02, 0.0, 0.02)
    ]
    found = beyond_twins(trained, twins)
    assert isinstance(found, Estimate)
    assert float(found) == pytest.approx(0.2 - 0.03)
    assert isinstance(beyond_twins(trained, [{"x": Untested("alike")}] * 3), Untested)
