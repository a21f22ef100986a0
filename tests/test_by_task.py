"""By task: functions of the entries that were measured, and the reasons of those that were not."""

from lib.evidence.by_task import both, each
from lib.science.estimate import Untested

FOUND = {"a": 1, "b": Untested("lost"), "c": 3}


def test_a_function_meets_what_was_found_and_reasons_stay():
    assert each(FOUND, lambda one: one + 1) == {"a": 2, "b": Untested("lost"), "c": 4}


def test_what_is_untested_in_either_stays_so_with_its_own_reason():
    others = {"d": 4, "c": Untested("short"), "b": Untested("flat"), "a": 10}
    expected = {"a": -9, "b": Untested("lost"), "c": Untested("short")}
    assert both(FOUND, others, lambda one, other: one - other) == expected
