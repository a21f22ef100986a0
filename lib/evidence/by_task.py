"""By task: functions of what was found of every task, where what is untested stays so."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lib.science.estimate import (
    Estimate,
    Measured,
    Untested,
    independent_difference,
    over_seeds,
    pool,
)

Found = TypeVar("Found")
Other = TypeVar("Other")
Result = TypeVar("Result")


def each(
    found: Mapping[str, Found | Untested], function: Callable[[Found], Result | Untested]
) -> dict[str, Result | Untested]:
    """Return a function of every task's entry; what is untested stays so."""
    return {
        name: one if isinstance(one, Untested) else function(one) for name, one in found.items()
    }


def both(
    found: Mapping[str, Found | Untested],
    others: Mapping[str, Other | Untested],
    function: Callable[[Found, Other], Result | Untested],
) -> dict[str, Result | Untested]:
    """Return a function of every task's two entries; what is untested in either stays so."""
    return {
        name: one
        if isinstance(one, Untested)
        else (other if isinstance(other, Untested) else function(one, other))
        for name, one in found.items()
        for other in (others[name],)
    }


def over_twins(
    twins: Sequence[Mapping[str, Mapping[str, Measured]]],
) -> dict[str, dict[str, Measured]]:
    """Return the means of the twins' statistics by name and place, their seeds the units."""
    return {
        name: {place: over_seeds([twin[name][place] for twin in twins]) for place in places}
        for name, places in twins[0].items()
    }


def measured_by_all(found: Sequence[Mapping[str, Measured]]) -> list[dict[str, Measured]]:
    """Return what each network shows on those tasks on which every one of them was measured."""
    names = [name for name in found[0] if all(isinstance(one.get(name), Estimate) for one in found)]
    return [{name: one[name] for name in names} for one in found]


def beyond_twins(
    trained: Mapping[str, Measured], twins: Sequence[Mapping[str, Measured]]
) -> Measured:
    """Return a number pooled over tasks less that of untrained twins, on the same tasks."""
    own, *seeds = map(pool, measured_by_all([trained, *twins]))
    return independent_difference(own, over_seeds(seeds))
