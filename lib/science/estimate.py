"""Estimates: a value with its bootstrap draws, the one currency between measurement and verdict.

The draws are taken over **units** (subjects, texts, seeds), never over prompts or pairs. How often
each unit is drawn follows from the units' name alone (`unit_weights`), so two numbers of the same
units are paired draw by draw, and no number depends on its place in a list.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, norm
from scipy.stats import t as student_t

FloatArray = NDArray[np.float64]

N_DRAWS = 1000
FEWEST_DRAWS = 2
FEWEST_UNITS = 3
SMALL = 10
"""Below so many units their draws are spread beforehand: percentiles of so few cannot be."""
ROUNDING = 1e-12
SEEDS = "seeds"
"""What the units of untrained twins, and of networks trained for the purpose, are called."""
LARGE = 10**6
"""Stands for the size of a sample whose draws are spread already."""
OWN = "own: "
"""What the names of a reader's own tasks begin with; no pooled number counts them."""
T = TypeVar("T")


class Interval(NamedTuple):
    """Lower and upper ends, each of the shape of the value."""

    low: FloatArray
    high: FloatArray


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value and its draws over units.

    Attributes:
        draws: `[1 + n_draws, ...]`; the first row is the value itself.
        units: what was drawn, such as "subjects of capitals"; numbers of equal units are paired.
        n_units: how many of them.
        n_least: the smallest sample among those pooled; by it intervals are expanded.
        share: whether the value is a share of units, in [0, 1]; where all units agree its interval
            is exact (Clopper and Pearson 1934) instead of a point.
    """

    draws: FloatArray
    units: str
    n_units: int
    n_least: int = 0
    share: bool = False

    def __post_init__(self) -> None:
        """Check the draws; ValueError names the units."""
        object.__setattr__(self, "draws", np.asarray(self.draws, dtype=np.float64))
        object.__setattr__(self, "n_least", self.n_least or self.n_units)
        if self.draws.ndim == 0 or len(self.draws) < 1 + FEWEST_DRAWS:
            raise ValueError(
                f"An estimate over {self.units} needs its value and two draws or more; got shape "
                f"{self.draws.shape}."
            )
        if not np.isfinite(self.draws).all():
            raise ValueError(
                f"An estimate over {self.units} holds {int((~np.isfinite(self.draws)).sum())} "
                "values that are NaN or infinite; leave out what cannot be measured (Untested)."
            )

    @property
    def value(self) -> FloatArray:
        """The estimate itself, of the shape of one draw."""
        return self.draws[0]

    def __float__(self) -> float:
        """Return the value of an estimate of one number."""
        return float(self.value)

    def __sub__(self, other: Measured | float) -> Measured:
        return self._with(other, np.subtract)

    def __add__(self, other: Measured | float) -> Measured:
        return self._with(other, np.add)

    def __mul__(self, other: Measured | float) -> Measured:
        return self._with(other, np.multiply)

    def __truediv__(self, other: Measured | float) -> Measured:
        if isinstance(other, Estimate) and bool((other.draws == 0).any()):
            return Untested("the number to divide by is zero in some draws")
        return self._with(other, np.divide)

    def _with(self, other: Measured | float, operation: Callable[..., FloatArray]) -> Measured:
        if isinstance(other, Untested):
            return other
        if isinstance(other, Estimate):
            other_draws = self._paired(other).draws
            return replace(self, draws=operation(self.draws, other_draws), share=False)
        return replace(self, draws=operation(self.draws, other), share=False)

    def _paired(self, other: Estimate) -> Estimate:
        if (other.units, other.n_units) != (self.units, self.n_units):
            raise ValueError(
                f"Estimates over {self.n_units} {self.units} and over {other.n_units} "
                f"{other.units} are not paired; use `independent_difference`."
            )
        return other

    def at(self, index: Any) -> Estimate:
        """Return the entries of a block or of other leading places of the value."""
        return replace(self, draws=self.draws[:, index])

    def over(self, blocks: Sequence[int] | range) -> Measured:
        """Return the mean over some blocks, the first axis of the value."""
        chosen = [int(block) for block in blocks]
        if not chosen:
            return Untested("no block to take the mean over")
        return replace(self, draws=self.draws[:, chosen].mean(axis=1))

    def map(self, function: Callable[[FloatArray], ArrayLike]) -> Measured:
        """Return a function of the value, applied to it and to each draw.

        A draw on which it is NaN (a curve that never crosses, say) makes the number untested.
        """
        draws = np.stack([np.asarray(function(draw), dtype=np.float64) for draw in self.draws])
        lost = int((~np.isfinite(draws.reshape(len(draws), -1)).all(axis=1)).sum())
        if lost:
            return Untested(f"undefined in {lost} of {len(draws)} draws over {self.units}")
        return replace(self, draws=draws, share=False)

    @property
    def unanimous(self) -> bool:
        """Whether a number without an exact interval has no spread at all over its draws."""
        flat = np.ptp(self.draws, axis=0) <= ROUNDING * np.maximum(np.abs(self.value), 1)
        exact = self.share & np.isin(self.value, (0.0, 1.0))
        return bool((flat & ~exact).any())

    def interval(self, level: float = 0.95) -> Interval:
        """Return the percentile interval over units, expanded for small samples.

        The percentiles are those at which Student's t interval of n units would be as wide as a
        normal one, √(n / (n − 1)) included (Hesterberg 2015, The American Statistician 69,
        section 5). Where all units agree on a share of 0 or 1: Clopper and Pearson's exact one.
        """
        n = max(self.n_least, 2)
        tail = (1 - level) / 2
        tail = float(norm.cdf(math.sqrt(n / (n - 1)) * student_t.ppf(tail, n - 1)))
        low, high = np.quantile(self.draws, [tail, 1 - tail], axis=0)
        if self.share:
            agreed = np.ptp(self.draws, axis=0) == 0
            rest = float(beta.ppf((1 - level) / 2, self.n_units, 1))
            low = np.where(agreed & (self.value == 1), rest, low)
            high = np.where(agreed & (self.value == 0), 1 - rest, high)
        return Interval(np.asarray(low), np.asarray(high))

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """Return a row for each entry of the value: `block`, `estimate`, `low`, `high`, `n`."""
        value, low, high = map(np.atleast_1d, (self.value, *self.interval(level)))
        frame = pd.DataFrame({"estimate": value, "low": low, "high": high, "n": self.n_units})
        return frame.rename_axis("block").reset_index()


@dataclass(frozen=True)
class Untested:
    """What stands in an estimate's place where nothing could be measured: the reason, a clause."""

    reason: str

    def __sub__(self, _other: Measured | float) -> Untested:
        return self

    __add__ = __mul__ = __truediv__ = __sub__

    def at(self, _index: Any) -> Untested:
        """Return itself."""
        return self

    def over(self, _blocks: Sequence[int] | range) -> Untested:
        """Return itself."""
        return self

    def map(self, _function: Callable[[FloatArray], ArrayLike]) -> Untested:
        """Return itself."""
        return self


Measured = Estimate | Untested


def stack(*parts: Measured) -> Measured:
    """Return several paired numbers as one, a new first axis of the value."""
    for part in parts:
        if isinstance(part, Untested):
            return part
    first = parts[0]
    assert isinstance(first, Estimate)
    found = [first._paired(part) for part in parts if isinstance(part, Estimate)]
    return replace(first, draws=np.stack([part.draws for part in found], axis=1), share=False)


def generator(*names: str) -> np.random.Generator:
    """Return a generator of random numbers seeded by names, never by a place in a list."""
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    return np.random.default_rng(list(digest))


@lru_cache(maxsize=64)
def unit_weights(units: str, n_units: int, n_draws: int = N_DRAWS) -> FloatArray:
    """Return how often each unit counts, `[1 + n_draws, n_units]`; the first row is all ones.

    A draw takes n_units of the units with replacement; of ten or more it takes three different ones
    at least (fewer give no correlation). The same for equal `units` and `n_units`, so that all
    numbers of them are paired.

    Raises:
        ValueError: fewer than three units.
    """
    if n_units < FEWEST_UNITS:
        raise ValueError(f"{n_units} {units}: an interval needs {FEWEST_UNITS} or more.")
    rng = generator("bootstrap", units)
    shares = np.full(n_units, 1 / n_units)
    weights = rng.multinomial(n_units, shares, size=n_draws)
    fewest = FEWEST_UNITS if n_units >= SMALL else 1
    while (poor := (weights > 0).sum(axis=1) < fewest).any():
        weights[poor] = rng.multinomial(n_units, shares, size=int(poor.sum()))
    result = np.concatenate([np.ones((1, n_units)), weights])
    result.setflags(write=False)
    return result


def mean_over_units(values: ArrayLike, units: str, *, share: bool = False) -> Measured:
    """Return the mean of one value per unit, `[n_units, ...]`; Untested below three units."""
    table = np.asarray(values, dtype=np.float64)
    if len(table) < FEWEST_UNITS:
        return Untested(f"{len(table)} {units}, at least {FEWEST_UNITS} are needed")
    draws = np.tensordot(unit_weights(units, len(table)), table, axes=1) / len(table)
    if len(table) < SMALL and not share:
        draws = draws[0] + (draws - draws[0]) * _spread(len(table))
        return Estimate(draws, units, len(table), n_least=LARGE)
    return Estimate(draws, units, len(table), share=share)


def ratio_of_sums(numerators: ArrayLike, denominators: ArrayLike, units: str) -> Measured:
    """Return Σ numerators / Σ denominators over units, each `[n_units, ...]`."""
    above, below = mean_over_units(numerators, units), mean_over_units(denominators, units)
    return above / below


def sums_by_unit(values: ArrayLike, unit: ArrayLike) -> FloatArray:
    """Return each unit's sum, units ascending, `[n_units, ...]` of values `[..., n_pairs]`."""
    units, place = np.unique(unit, return_inverse=True)
    table = np.moveaxis(np.asarray(values, dtype=np.float64), -1, 0)
    result = np.zeros((len(units), *table.shape[1:]))
    np.add.at(result, place, table)
    return result


def means_by_unit(values: ArrayLike, unit: ArrayLike) -> FloatArray:
    """Return each unit's mean, units ascending, `[n_units, ...]` of values `[..., n_pairs]`."""
    sums, counts = sums_by_unit(values, unit), np.unique(unit, return_counts=True)[1]
    return (sums.T / counts).T


def share_limits(n_units: int) -> tuple[float, float]:
    """Return what n units can tell of a share of them, before anything is measured.

    Of 95 % intervals the half-width around one half, where it is widest, and the lower end where
    all units agree (Clopper and Pearson).
    """
    tail = (1 - 0.95) / 2
    n = max(n_units, 2)
    return 0.5 * float(-student_t.ppf(tail, n - 1)) / math.sqrt(n - 1), tail ** (1 / n)


def is_own(name: str) -> bool:
    """Return whether a task, or the place of a record, is a reader's own."""
    return name.startswith(OWN)


def of_the_book(found: Mapping[str, T]) -> dict[str, T]:
    """Return the entries of the book's tasks, without those of a reader's own."""
    return {name: one for name, one in found.items() if not is_own(name)}


def mean_of(measured: Sequence[Measured]) -> Measured:
    """Return the mean of paired numbers; Untested where one is."""
    return sum(measured[1:], start=measured[0]) / float(len(measured))


def pool(estimates: Mapping[str, Measured]) -> Measured:
    """Return the mean over tasks, its draws the mean of the tasks' draws; untested ones left out.

    Each task's weights are drawn independently, by the task's name; a subject that stands in
    several tasks counts as several units, so the interval is a little too narrow if its values go
    together. Twins' tasks share the seeds, and are paired. A reader's own tasks are left out.
    Untested if none was measured.
    """
    estimates = of_the_book(estimates)
    found = {name: one for name, one in estimates.items() if isinstance(one, Estimate)}
    if not found:
        reasons = [f"{name}: {one.reason}" for name, one in estimates.items()]  # type: ignore[union-attr]
        shared = {one.reason for one in estimates.values() if isinstance(one, Untested)}
        if len(estimates) > 1 and len(shared) == 1:
            return Untested(shared.pop())
        return Untested("; ".join(reasons) or "no task")
    if len(found) == 1:
        return next(iter(found.values()))
    parts = list(found.values())
    samples = {part.units: part.n_units for part in parts}
    return Estimate(
        np.mean([part.draws for part in parts], axis=0),
        " + ".join(sorted(samples)),
        sum(samples.values()),
        n_least=min(part.n_least for part in parts),
        share=all(part.share for part in parts),
    )


def over_seeds(values: Sequence[Measured]) -> Measured:
    """Return the mean over networks of one number each, their seeds the units.

    Each value counts as one number, however many draws it has. Untested if any of them is.
    """
    lost = [one.reason for one in values if isinstance(one, Untested)]
    if lost:
        return Untested(f"{len(lost)} of {len(values)} networks: {lost[0]}")
    return mean_over_units([one.value for one in values if isinstance(one, Estimate)], SEEDS)


def independent_difference(first: Measured, second: Measured) -> Measured:
    """Return first − second of different units: a model's subjects, say, and its twins' seeds.

    The draws of both are independent. Each is spread by what its own sample size asks for before
    the difference is taken, so that a few seeds do not borrow certainty from many subjects.
    """
    if isinstance(first, Untested):
        return first
    if isinstance(second, Untested):
        return second
    if first.units == second.units:
        raise ValueError(f"Both estimates are over {first.units}: subtract them, they are paired.")
    one, other = (
        part.value + (part.draws - part.value) * _spread(part.n_least) for part in (first, second)
    )
    draws = np.concatenate([(first.value - second.value)[None], (one - other)[1:]])
    units = f"{first.units} against {second.units}"
    return Estimate(draws, units, first.n_units + second.n_units, n_least=LARGE)


def _spread(n: int) -> float:
    """Return by how much draws over n units are spread for their 95 % interval to be Student's."""
    n = max(n, 2)
    return math.sqrt(n / (n - 1)) * float(student_t.ppf(0.975, n - 1) / norm.ppf(0.975))
