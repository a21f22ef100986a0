"""Criteria and verdicts: estimates against what was written down beforehand in `criteria.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from lib.engine.files import DATA
from lib.science.estimate import Measured, Untested, is_own, pool

Relation = Literal[">=", ">", "<=", "<", "within"]
Verdict = Literal["supported", "refuted", "undecided", "not testable"]
Record = dict[str, Any]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
TEXTS, POOLED, MODEL = "texts", "all tasks", "model"
"""Places of records that are judged; a task's name is the place of one that is shown.

A reader's own tasks are held against the criteria one by one, and count in no pooled verdict."""
MOST_REFUTING = 0.25
"""A pooled "supported" stands only if at most this share of the tasks refute it."""


@dataclass(frozen=True)
class Criterion:
    """What one statistic of a claim has to be; the fields are explained in criteria.toml."""

    claim: str
    part: str
    statistic: str
    relation: Relation
    threshold: float
    places: str
    unit: str
    text: str
    expected: str = ""
    comparative: bool = False
    date: Any = None
    reason: str = ""

    def __post_init__(self) -> None:
        """Check the choices, since they come from a file."""
        if self.relation not in get_args(Relation):
            raise ValueError(f"{self.statistic}: {self.relation!r} is no relation.")
        if not set(self.places.split(", ")) <= {"texts", "tasks", "model"}:
            raise ValueError(f"{self.statistic}: {self.places!r} are no places.")

    @property
    def level(self) -> float:
        """The level of the interval that is judged: 0.95, for an equivalence 0.9."""
        return 0.9 if self.relation == "within" else 0.95

    @property
    def wanted(self) -> str:
        """The criterion in signs, such as "≥ 0.8"."""
        signs = {">=": "≥", "<=": "≤", "within": "within ±"}
        return f"{signs.get(self.relation, self.relation)} {self.threshold:g}".replace("± ", "±")

    def verdict(self, low: float, high: float) -> Verdict:
        """Return what an interval decides."""
        t = self.threshold
        if self.relation == "within":
            inside, outside = -t < low and high < t, low >= t or high <= -t
        elif self.relation in (">=", ">"):
            inside = low >= t if self.relation == ">=" else low > t
            outside = high < t if self.relation == ">=" else high <= t
        else:
            inside = high <= t if self.relation == "<=" else high < t
            outside = low > t if self.relation == "<=" else low >= t
        return "supported" if inside else "refuted" if outside else "undecided"

    def worst(self, value: np.ndarray) -> int:
        """Return the entry of a value per block that is furthest from meeting the criterion."""
        if self.relation == "within":
            return int(np.abs(value).argmax())
        return int(value.argmin() if self.relation in (">=", ">") else value.argmax())


@cache
def criteria(claim: str | None = None) -> tuple[Criterion, ...]:
    """Return all criteria, or those of a claim, in the order of the file.

    Raises:
        ValueError: an unknown claim (the known ones are listed), a statistic there twice.
    """
    found = tuple(Criterion(**entry) for entry in registration()["criterion"])
    names = [(one.claim, one.statistic) for one in found]
    if len(set(names)) != len(names):
        raise ValueError("criteria.toml: a claim has two criteria for one statistic.")
    own = tuple(one for one in found if claim in (None, one.claim))
    if not own:
        known = ", ".join(dict.fromkeys(one.claim for one in found))
        raise ValueError(f"Unknown claim {claim!r}; choose one of {known}.")
    return own


@cache
def registration() -> dict[str, Any]:
    """Return criteria.toml as it stands: date, material, tolerance, amendments, criteria."""
    return tomllib.loads((DATA / "criteria.toml").read_text(encoding="utf-8"))


def is_held_out(place: str) -> bool:
    """Return whether a task played no part in choosing the criteria."""
    return place not in registration()["material"]["seen_tasks"]


Statistics = Mapping[str, Measured | Mapping[str, Measured]]


def judge(
    claim: str, model: str, statistics: Statistics, twins: Statistics | None = None
) -> list[Record]:
    """Return the records of a claim on one model: numbers, intervals, verdicts.

    A statistic that the untrained twins meet as well is marked `architecture`.

    Args:
        claim: the chapter's name.
        model: the model's name.
        statistics: an estimate for every criterion of the claim; where its places are texts or
            tasks, a mapping from place to estimate. Tasks are pooled here.
        twins: the same of the untrained twins, but for the criteria that compare with them.

    Raises:
        ValueError: a statistic that is missing or that no criterion names.
    """
    records = _judge_all(claim, model, statistics, criteria(claim), untrained=False)
    if twins is not None:
        own = [one for one in criteria(claim) if not one.comparative]
        records += _judge_all(claim, model, twins, own, untrained=True)
        met = {
            (row["statistic"], row["place"])
            for row in records
            if row["untrained"] and row["verdict"] == "supported"
        }
        for row in records:
            row["architecture"] = (row["statistic"], row["place"]) in met
    return records


def _judge_all(
    claim: str,
    model: str,
    statistics: Statistics,
    wanted: Sequence[Criterion],
    *,
    untrained: bool,
) -> list[Record]:
    names = [criterion.statistic for criterion in wanted]
    if set(names) != set(statistics):
        missing = ", ".join(sorted(set(names) - set(statistics))) or "none"
        unknown = ", ".join(sorted(set(statistics) - set(names))) or "none"
        raise ValueError(f"{claim}: statistics missing: {missing}; in no criterion: {unknown}.")
    records = []
    for criterion in wanted:
        given = statistics[criterion.statistic]
        by_place = dict(given) if isinstance(given, Mapping) else {MODEL: given}
        tasks = {
            place: by_place.pop(place) for place in list(by_place) if place not in (TEXTS, MODEL)
        }
        if "tasks" in criterion.places:
            by_place[POOLED] = pool(tasks)
        expected = {"texts": TEXTS, "tasks": POOLED, "model": MODEL}
        if {expected[place] for place in criterion.places.split(", ")} != set(by_place):
            raise ValueError(
                f"{claim}, {criterion.statistic}: expected {criterion.places}, got "
                f"{', '.join(by_place)}."
            )
        shown = [_record(criterion, model, untrained, place, one) for place, one in tasks.items()]
        for place, one in by_place.items():
            row = _record(criterion, model, untrained, place, one)
            if place == POOLED and row["verdict"] == "supported":
                book = [other for other in shown if not is_own(other["place"])]
                tested = [other for other in book if other["verdict"] != "not testable"]
                against = [other["place"] for other in tested if other["verdict"] == "refuted"]
                if len(against) > MOST_REFUTING * len(tested):
                    row["verdict"] = "undecided"
                    row["reason"] = f"{len(against)} of {len(tested)} tasks refute it"
            records.append(row)
        records += shown
    return records


def _record(criterion: Criterion, model: str, untrained: bool, place: str, one: Measured) -> Record:
    record: Record = {
        "claim": criterion.claim,
        "part": criterion.part,
        "statistic": criterion.statistic,
        "place": place,
        "model": model,
        "untrained": untrained,
        "estimate": None,
        "low": None,
        "high": None,
        "level": criterion.level,
        "n": 0,
        "criterion": criterion.wanted,
        "verdict": "not testable",
        "architecture": False,
        "held_out": is_held_out(place),
        "reason": "",
    }
    if isinstance(one, Untested):
        return {**record, "reason": one.reason}
    record["n"] = one.n_units
    if one.unanimous:
        return {
            **record,
            "reason": f"all {one.n_units} {one.units} agree, so no interval can be given",
        }
    value, low, high = map(np.atleast_1d, (one.value, *one.interval(criterion.level)))
    verdicts = {criterion.verdict(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)}
    if "refuted" in verdicts and len(value) > 1:  # any of several would do: Bonferroni
        wide = one.interval(1 - (1 - criterion.level) / len(value))
        if "refuted" not in map(criterion.verdict, wide.low.tolist(), wide.high.tolist()):
            verdicts = verdicts - {"refuted"} | {"undecided"}
    worst = criterion.worst(value)
    record |= {
        "estimate": float(value[worst]),
        "low": float(low[worst]),
        "high": float(high[worst]),
    }
    record["verdict"] = join(verdicts)
    return record


def join(verdicts: Iterable[str]) -> Verdict:
    """Return the verdict on several numbers that all have to hold.

    Refuted when one is, else not testable when none could be tested, supported when all are that
    could be, else undecided. One that could not be tested leaves the others undecided.
    """
    found = set(verdicts)
    if "refuted" in found:
        return "refuted"
    if found <= {"not testable"}:
        return "not testable"
    return "supported" if found == {"supported"} else "undecided"


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict on a claim and on each of its parts, for one model or its untrained twins."""

    claim: str
    model: str
    untrained: bool
    verdict: Verdict
    parts: Mapping[str, Verdict]


def judged(row: Mapping[str, Any]) -> bool:
    """Return whether a record counts towards its part, rather than showing one task."""
    return row["place"] in (TEXTS, POOLED, MODEL)


def tasks_pooled(records: Iterable[Mapping[str, Any]], criterion: Criterion) -> int:
    """Return over how many tasks a model's number of a criterion is pooled, from its records."""
    return sum(
        (row["claim"], row["statistic"]) == (criterion.claim, criterion.statistic)
        and not (judged(row) or row["untrained"] or is_own(row["place"]))
        and row["n"] > 0  # none were drawn of a task that could not be measured
        for row in records
    )


def without_record(records: Iterable[Mapping[str, Any]]) -> list[Criterion]:
    """Return the criteria without a record, of the claims that the records of a model judge.

    A claim whose criteria were amended lacks them until it is run again.
    """
    found = {
        (row["claim"], row["statistic"])
        for row in records
        if row["criterion"] and judged(row) and not row["untrained"]
    }
    claims = {claim for claim, _ in found}
    return [
        one for one in criteria() if one.claim in claims and (one.claim, one.statistic) not in found
    ]


def claim_verdict(
    records: Iterable[Mapping[str, Any]], claim: str, model: str, *, untrained: bool = False
) -> ClaimVerdict:
    """Return the verdict on a claim from its records.

    Twins are not judged by what compares with them; a part that holds nothing else cannot be tested
    on them, and so they support no claim that has one.

    Raises:
        ValueError: a statistic without a record.
    """
    own = [
        row
        for row in records
        if (row["claim"], row["model"], row["untrained"]) == (claim, model, untrained)
        and judged(row)
    ]
    parts: dict[str, list[str]] = {}
    for criterion in criteria(claim):
        found = [row["verdict"] for row in own if row["statistic"] == criterion.statistic]
        if untrained and criterion.comparative:
            found = ["not testable"]
        if not found:
            raise ValueError(f"{claim}: no record of {criterion.statistic} for {model}.")
        parts.setdefault(criterion.part, []).extend(found)
    joined = {part: join(verdicts) for part, verdicts in parts.items()}
    return ClaimVerdict(claim, model, untrained, join(joined.values()), joined)
