"""Verdicts: measured numbers against the criteria written down beforehand in data/criteria.toml."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from lib.evidence.results import RECORD_COLUMNS

CRITERIA_FILE = Path(__file__).parents[1] / "data" / "criteria.toml"
ALL_TASKS = "all tasks"
"""The task of a record that is judged once a model rather than task by task."""
SHARE_OF_TASKS = 0.75
"""A part judged by task is supported on at least this share of its testable tasks."""

Bound = Literal["low", "high", "estimate", "equivalence"]
Scope = Literal["task", "model"]
Relation = Literal[">=", ">", "<=", "<"]
Verdict = Literal["supported", "not supported", "not testable"]
Record = dict[str, Any]

RECORD_ORDER = (*RECORD_COLUMNS, "reason", "held_out")


@dataclass(frozen=True)
class Criterion:
    """What one statistic of a claim has to be; the fields are explained in criteria.toml."""

    claim: str
    part: str
    statistic: str
    scope: Scope
    bound: Bound
    relation: Relation
    threshold: float
    text: str
    date: date
    reason: str
    optional: bool = False
    null_expected: bool = True
    null_of: str | None = None

    def __post_init__(self) -> None:
        """Check the choices, since they come from a file."""
        for value, choices in (
            (self.scope, get_args(Scope)),
            (self.bound, get_args(Bound)),
            (self.relation, get_args(Relation)),
        ):
            if value not in choices:
                raise ValueError(f"Criterion {self.statistic}: {value!r} is none of {choices}.")

    def is_met(self, estimate: float, low: float | None, high: float | None) -> bool:
        """Return whether the bound that counts is on the right side of the threshold."""
        if self.bound == "equivalence":
            assert low is not None
            assert high is not None
            return -self.threshold < low and high < self.threshold
        value = {"estimate": estimate, "low": low, "high": high}[self.bound]
        assert value is not None
        return {
            ">=": value >= self.threshold,
            ">": value > self.threshold,
            "<=": value <= self.threshold,
            "<": value < self.threshold,
        }[self.relation]


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict on a claim as a whole, for one model, with that on each of its parts."""

    claim: str
    model: str
    untrained: bool
    verdict: Verdict
    parts: Mapping[str, Verdict]
    reason: str  # which parts decided, and on how many tasks


@cache
def criteria() -> tuple[Criterion, ...]:
    """Return all criteria in the order of the file.

    Raises:
        ValueError: A statistic that occurs twice within a claim, an unknown choice, a null of a
            statistic that the claim has not.
    """
    found = tuple(Criterion(**entry) for entry in _file()["criterion"])
    names = [(criterion.claim, criterion.statistic) for criterion in found]
    if len(set(names)) != len(names):
        raise ValueError(f"{CRITERIA_FILE.name}: a claim has two criteria for one statistic.")
    for criterion in found:
        if criterion.null_of and (criterion.claim, criterion.null_of) not in names:
            raise ValueError(
                f"Criterion {criterion.statistic}: null_of names {criterion.null_of!r}, "
                f"which is no statistic of {criterion.claim}."
            )
    return found


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(CRITERIA_FILE.read_text(encoding="utf-8"))


def criterion_of(claim: str, statistic: str) -> Criterion:
    """Return the criterion for one statistic of a claim.

    Raises:
        ValueError: No such claim, or no such statistic in it; the valid names are listed.
    """
    of_claim = [criterion for criterion in criteria() if criterion.claim == claim]
    if not of_claim:
        known = sorted({criterion.claim for criterion in criteria()})
        raise ValueError(f"Unknown claim {claim!r}; choose one of {', '.join(known)}.")
    for criterion in of_claim:
        if criterion.statistic == statistic:
            return criterion
    known = [criterion.statistic for criterion in of_claim]
    raise ValueError(f"{claim} has no statistic {statistic!r}; choose one of {', '.join(known)}.")


def is_held_out(task: str) -> bool:
    """Return whether a task played no part in choosing the criteria (contexts did not either)."""
    return task not in _file()["material"]["seen_tasks"]


def tolerance(low: float | None, high: float | None) -> float:
    """Return how far a number may be from the recorded one, whose interval is [low, high].

    A number without interval, a count say, has the absolute tolerance alone.
    """
    stated = _file()["tolerance"]
    width = 0.0 if low is None or high is None else high - low
    return max(stated["absolute"], stated["share_of_interval"] * width)


def interval_level(claim: str, statistic: str) -> float:
    """Return the level of the interval that the criterion is judged by: 0.95, or 0.9 for TOST.

    Raises:
        ValueError: As `criterion_of`.
    """
    return 0.9 if criterion_of(claim, statistic).bound == "equivalence" else 0.95


# --- records -------------------------------------------------------------------------------------


def judge(
    claim: str,
    statistic: str,
    *,
    task: str = ALL_TASKS,
    model: str,
    untrained: bool,
    estimate: float | None,
    low: float | None = None,
    high: float | None = None,
    n: int,
    reason: str | None = None,
) -> Record:
    """Return the record of one statistic: the numbers, the criterion and the verdict.

    Args:
        claim: Name of the chapter.
        statistic: Name in criteria.toml.
        task: The task; left out for a criterion that is judged once a model.
        model: Name of the model.
        untrained: Whether it is the untrained twin.
        estimate: None if it could not be measured; ``reason`` then says why.
        low: Lower end of the interval over prompts, of level `interval_level`.
        high: Upper end.
        n: Prompts or contexts (tasks or attributes, where these are counted) behind it.
        reason: Why it is not testable; otherwise a remark.

    Returns:
        A dictionary with the keys `RECORD_ORDER`.

    Raises:
        ValueError: Unknown claim or statistic, numbers that are missing, not finite or reversed, a
            task where none belongs or none where one does, no reason for what is not testable.
    """
    criterion = criterion_of(claim, statistic)
    name = f"{claim}, {statistic}, {task}"
    if (task == ALL_TASKS) != (criterion.scope == "model"):
        needed = "is judged once a model: give no task" if task != ALL_TASKS else "needs a task"
        raise ValueError(f"{name}: this statistic {needed}.")
    numbers = (estimate, low, high)
    if estimate is None:
        if not reason:
            raise ValueError(f"{name}: without an estimate, give the reason why not testable.")
        if low is not None or high is not None:
            raise ValueError(f"{name}: an interval without an estimate.")
        verdict: Verdict = "not testable"
    else:
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError(f"{name}: estimate, low and high must be finite; got {numbers}.")
        if criterion.bound != "estimate" and (low is None or high is None):
            raise ValueError(f"{name}: the criterion is on the interval; give low and high.")
        if low is not None and high is not None and low > high:
            raise ValueError(f"{name}: the interval [{low}, {high}] is reversed.")
        verdict = "supported" if criterion.is_met(estimate, low, high) else "not supported"
    values = [None if number is None else float(number) for number in numbers]
    return {
        "claim": claim,
        "part": criterion.part,
        "task": task,
        "model": model,
        "untrained": bool(untrained),
        "statistic": statistic,
        "estimate": values[0],
        "ci_low": values[1],
        "ci_high": values[2],
        "criterion": criterion.text,
        "n": int(n),
        "verdict": verdict,
        "reason": reason or "",
        "held_out": is_held_out(task),
    }


def verdict_table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return records as a table with the columns `RECORD_ORDER`, in the order of the criteria.

    Trained before untrained, then as the criteria file has the statistics, then by task.
    """
    order = {(c.claim, c.statistic): place for place, c in enumerate(criteria())}
    rows = sorted(
        records,
        key=lambda row: (
            row["model"],
            row["untrained"],
            order[row["claim"], row["statistic"]],
            row["task"],
        ),
    )
    return pd.DataFrame([dict(row) for row in rows], columns=list(RECORD_ORDER))


# --- the claim as a whole ------------------------------------------------------------------------


def claim_verdict(
    records: Iterable[Mapping[str, Any]],
    claim: str,
    model: str,
    untrained: bool,
    *,
    held_out_only: bool = False,
) -> ClaimVerdict:
    """Return the verdict on a claim as a whole, for one model.

    A task supports a part when it supports all of the part's statistics; an optional one that is
    not testable is passed over. A part judged by task is supported on at least three quarters of
    its testable tasks, and on at least three quarters of those among them that are held out. The
    claim is supported when each of its parts is; with a part that could not be tested it is not
    testable, unless another is not supported.

    Args:
        records: Records of `judge`, of any claims and models.
        claim: Name of the chapter.
        model: Name of the model.
        untrained: Whether its twin is meant.
        held_out_only: Leave out the tasks that were seen while the criteria were chosen. What is
            judged once a model stays.

    Raises:
        ValueError: Unknown claim; a record that is missing or there twice.
    """
    of_claim = [criterion for criterion in criteria() if criterion.claim == claim]
    if not of_claim:
        criterion_of(claim, "")
    own = [
        row
        for row in records
        if (row["claim"], row["model"], row["untrained"]) == (claim, model, untrained)
    ]
    parts: dict[str, Verdict] = {}
    reasons = []
    for part in dict.fromkeys(criterion.part for criterion in of_claim):
        needed = [criterion for criterion in of_claim if criterion.part == part]
        tasks = _task_verdicts([row for row in own if row["part"] == part], needed)
        if held_out_only:
            tasks = {task: verdict for task, verdict in tasks.items() if is_held_out(task)}
        parts[part], reason = _part_verdict(tasks)
        reasons.append(f"{part}: {parts[part]}{reason}")
    verdicts = set(parts.values())
    verdict: Verdict = "supported"
    if verdicts != {"supported"}:
        verdict = "not supported" if "not supported" in verdicts else "not testable"
    return ClaimVerdict(claim, model, untrained, verdict, parts, "; ".join(reasons))


def verdict_sentence(records: Sequence[Mapping[str, Any]], claim: str, model: str) -> str:
    """Return the verdict on the model and on its twin in one sentence."""
    words = []
    for untrained in (False, True):
        found = claim_verdict(records, claim, model, untrained)
        parts = ", ".join(f"“{part}” {verdict}" for part, verdict in found.parts.items())
        words.append((found.verdict, parts))
    return (
        f"the claim as a whole is {words[0][0]} ({words[0][1]}); on its untrained twin it is "
        f"{words[1][0]} ({words[1][1]})"
    )


def _task_verdicts(rows: list[Mapping[str, Any]], needed: list[Criterion]) -> dict[str, Verdict]:
    """Return the verdict of each task on one part, from a complete set of its records."""
    by_task: dict[str, dict[str, Verdict]] = {}
    for row in rows:
        found = by_task.setdefault(row["task"], {})
        if row["statistic"] in found:
            raise ValueError(f"Two records of {row['statistic']} on {row['task']}.")
        found[row["statistic"]] = row["verdict"]
    if not by_task:
        raise ValueError(f"{needed[0].claim}: no record of the part {needed[0].part!r}.")
    result: dict[str, Verdict] = {}
    for task, found in by_task.items():
        missing = [c.statistic for c in needed if c.statistic not in found]
        if missing:
            raise ValueError(f"{needed[0].claim}: no record of {', '.join(missing)} on {task}.")
        counted = {
            found[c.statistic]
            for c in needed
            if not (c.optional and found[c.statistic] == "not testable")
        }
        if "not supported" in counted:
            result[task] = "not supported"
        else:
            result[task] = "supported" if counted == {"supported"} else "not testable"
    return result


def _part_verdict(tasks: Mapping[str, Verdict]) -> tuple[Verdict, str]:
    """Return the verdict on a part and on how many tasks it rests."""
    if set(tasks) == {ALL_TASKS}:
        return tasks[ALL_TASKS], ""
    testable = {task: verdict for task, verdict in tasks.items() if verdict != "not testable"}
    held_out = {task: verdict for task, verdict in testable.items() if is_held_out(task)}
    if not held_out:
        return "not testable", " (no held-out task)" if testable else " (no task)"
    counts = [
        (sum(verdict == "supported" for verdict in group.values()), len(group))
        for group in (testable, held_out)
    ]
    verdict: Verdict = "supported"
    if any(n_supported < SHARE_OF_TASKS * n for n_supported, n in counts):
        verdict = "not supported"
    (all_supported, n_all), (held_supported, n_held) = counts
    return verdict, f" ({all_supported} of {n_all} tasks, held out {held_supported} of {n_held})"


# --- which blocks --------------------------------------------------------------------------------


def early_blocks(n_blocks: int) -> range:
    """Return the blocks from L/4 to L/2, both included where whole.

    Raises:
        ValueError: Fewer than four blocks.
    """
    _check_depth(n_blocks)
    return range(math.ceil(n_blocks / 4), n_blocks // 2 + 1)


def late_blocks(n_blocks: int, transition: float) -> range:
    """Return the blocks from the transition ℓ* to L − 2; the last block never counts.

    The untrained twin has no transition of its own: it is compared at the trained model's blocks.

    Raises:
        ValueError: Fewer than four blocks, a transition after block L − 2 or before block 0.
    """
    _check_depth(n_blocks)
    if not 0 <= transition <= n_blocks - 2:
        raise ValueError(
            f"No late blocks: the transition must be from 0 to {n_blocks - 2}; got {transition}."
        )
    return range(math.ceil(transition), n_blocks - 1)


def last_sixth(n_blocks: int) -> range:
    """Return the last L/6 blocks, rounded up, without the last one of all; at least one.

    Raises:
        ValueError: Fewer than four blocks.
    """
    _check_depth(n_blocks)
    return range(min(n_blocks - math.ceil(n_blocks / 6), n_blocks - 2), n_blocks - 1)


def _check_depth(n_blocks: int) -> None:
    if n_blocks < 4:
        raise ValueError(f"Need at least 4 blocks to tell early from late; got {n_blocks}.")
