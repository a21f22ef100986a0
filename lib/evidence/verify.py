"""Compares the results of the last build with the recorded ones: `python -m lib.evidence.verify`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib.evidence.results import (
    ROOT,
    Record,
    key_of,
    pages,
    read_rows,
    results_file,
    write_rows,
)
from lib.evidence.verdicts import (
    SHARE_OF_TASKS,
    Criterion,
    claim_verdict,
    criteria,
    criterion_of,
    tolerance,
)

RECORDED = Path("tests", "recorded", "results.json")
NUMBERS = ("estimate", "ci_low", "ci_high")


def verify(
    rows: Sequence[Record], recorded: Sequence[Record], chapters: Sequence[str]
) -> list[str]:
    """Returns what is wrong with the results of a build, one sentence each; empty if nothing is.

    Args:
        rows: the records of the build.
        recorded: the records that were reviewed and kept.
        chapters: the claims whose chapters are in the book; each owes records.
    """
    problems = [
        f"{claim}: no records; its chapter failed or was not built"
        for claim in chapters
        if not any(row["claim"] == claim for row in rows)
    ]
    now = {key_of(row): row for row in rows}
    before = {key_of(row): row for row in recorded}
    for key, row in before.items():
        if key not in now:
            problems.append(f"{name_of(row)}: recorded, but missing now")
        elif problem := difference(now[key], row):
            problems.append(f"{name_of(row)}: {problem}")
    problems += [
        f"{name_of(row)}: not recorded yet" for key, row in now.items() if key not in before
    ]
    return problems + incomplete_claims(rows) + false_positives(rows)


def difference(now: Record, before: Record) -> str:
    """Returns in what a record differs from the recorded one beyond tolerance; empty if in nothing.

    Verdict and criterion have to be the same, estimate and interval within
    `lib.evidence.verdicts.tolerance`, for the model and its untrained twin alike.
    """
    if now["verdict"] != before["verdict"]:
        return f"{now['verdict']} now, {before['verdict']} as recorded"
    if now["criterion"] != before["criterion"]:
        return f"judged by “{now['criterion']}” now, by “{before['criterion']}” as recorded"
    allowed = tolerance(before["ci_low"], before["ci_high"])
    for column in NUMBERS:
        value, old = now[column], before[column]
        if (value is None) != (old is None) or (
            value is not None and not abs(value - old) <= allowed
        ):
            return (
                f"{column} {_number(value)} now, {_number(old)} as recorded; "
                f"within {allowed:.2g} is allowed"
            )
    return ""


def incomplete_claims(rows: Sequence[Record]) -> list[str]:
    """Returns which records of a claim are missing or there twice, by the criteria."""
    problems = []
    for claim, model, untrained in _claims(rows):
        try:
            claim_verdict(rows, claim, model, untrained)
        except ValueError as problem:
            weights = "untrained" if untrained else "trained"
            problems.append(f"{claim} ({model}, {weights}): {problem}")
    return problems


def false_positives(rows: Sequence[Record]) -> list[str]:
    """Returns the nulls that come out supported, so that what they are nulls of is no evidence.

    On the untrained twin: a criterion that holds, as a part of a claim does, on three quarters of
    the testable tasks; a part can only hold where its criteria do. Those that any network may meet
    are marked `null_expected = false` and passed over. On any model: random donors and shuffled
    labels (`null_of`) that meet the criterion of what they are the null of, on any task.
    """
    problems = []
    for criterion in criteria():
        tested = [
            row
            for row in rows
            if row["untrained"]
            and row["verdict"] != "not testable"
            and (row["claim"], row["statistic"]) == (criterion.claim, criterion.statistic)
        ]
        met = [row for row in tested if row["verdict"] == "supported"]
        if criterion.null_expected and met and len(met) >= SHARE_OF_TASKS * len(tested):
            problems += [
                f"{name_of(row)}: supported on the untrained twin, so it is no evidence"
                for row in met
            ]
        if criterion.null_of:
            original = criterion_of(criterion.claim, criterion.null_of)
            problems += [
                f"{name_of(row)}: a null that meets the criterion of {original.statistic}"
                for row in rows
                if (row["claim"], row["statistic"]) == (criterion.claim, criterion.statistic)
                and _meets(row, original)
            ]
    return problems


def _meets(row: Record, criterion: Criterion) -> bool:
    return row["estimate"] is not None and criterion.is_met(*(row[column] for column in NUMBERS))


def _claims(rows: Sequence[Record]) -> list[tuple[str, str, bool]]:
    return sorted({(row["claim"], row["model"], row["untrained"]) for row in rows})


def comparison(rows: Sequence[Record], recorded: Sequence[Record]) -> pd.DataFrame:
    """Returns a table of all records, with what was recorded before and whether it is as recorded.

    Records that are missing now stand at the end. Columns: `claim`, `part`, `statistic`,
    `criterion`, `task`, `model`, `estimate` and `recorded` (numbers with intervals, as text),
    `verdict`, `recorded verdict`, and `as recorded`: yes, no, new or missing.
    """
    now = {key_of(row): row for row in rows}
    before = {key_of(row): row for row in recorded}
    found = []
    for key in dict.fromkeys([*now, *before]):
        row, old = now.get(key), before.get(key)
        known = row or old
        assert known is not None
        if row is None or old is None:
            as_recorded = "new" if old is None else "missing"
        else:
            as_recorded = "no" if difference(row, old) else "yes"
        found.append(
            {column: known[column] for column in ("claim", "part", "statistic", "criterion")}
            | {
                "task": known["task"],
                "model": f"{known['model']}, untrained" if known["untrained"] else known["model"],
                "estimate": _estimate(row),
                "verdict": row["verdict"] if row else "–",
                "recorded": _estimate(old),
                "recorded verdict": old["verdict"] if old else "–",
                "as recorded": as_recorded,
            }
        )
    return pd.DataFrame(found)


def changes(rows: Sequence[Record], recorded: Sequence[Record]) -> list[str]:
    """Returns what recording anew would change, a line for each record."""
    now = {key_of(row): row for row in rows}
    before = {key_of(row): row for row in recorded}
    lines = [f"+ {_summary(row)}" for key, row in now.items() if key not in before]
    lines += [f"- {_summary(row)}" for key, row in before.items() if key not in now]
    for key, row in now.items():
        if key in before and row != before[key]:
            others = [
                name
                for name in sorted({*row, *before[key]} - {*NUMBERS, "verdict"})
                if row.get(name) != before[key].get(name)
            ]
            also = f" (also changed: {', '.join(others)})" if others else ""
            lines.append(f"~ {_summary(before[key])} -> {_values(row)}{also}")
    return lines


def name_of(row: Mapping[str, Any]) -> str:
    """Returns a record's name as messages quote it."""
    weights = "untrained" if row["untrained"] else "trained"
    return f"{row['claim']} / {row['part']} / {row['task']} / {row['statistic']} ({weights})"


def _summary(row: Mapping[str, Any]) -> str:
    return f"{name_of(row)}: {_values(row)}"


def _values(row: Mapping[str, Any]) -> str:
    return f"{_estimate(row)}, {row['verdict']}"


def _estimate(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    estimate, low, high = (_number(row[column]) for column in NUMBERS)
    return f"{estimate} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Prints the comparison and returns the exit code: 0 only when all is as recorded."""
    parser = argparse.ArgumentParser(prog="python -m lib.evidence.verify", description=__doc__)
    parser.add_argument("--update", action="store_true", help="record the present results")
    update = parser.parse_args(arguments).update
    folder = root / "_build" / "results"
    if not results_file(folder).is_file():
        print("No results: the book was not built, or its build was cut short. Run `make book`.")
        return 1
    rows = read_rows(results_file(folder))
    file = root / RECORDED
    recorded = read_rows(file) if file.is_file() else []
    if rows or recorded:
        _print_comparison(comparison(rows, recorded))
        _print_claims(rows)
    present = {Path(page).name for page in pages(root)}
    claims = dict.fromkeys(criterion.claim for criterion in criteria())
    chapters = [claim for claim in claims if claim in present]
    if update:
        lines = changes(rows, recorded)
        write_rows(file, rows)
        print("\n".join(lines) or "Nothing changed.")
        recorded = rows
    problems = verify(rows, recorded, chapters)
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(rows)} records, {len(problems)} problems")
    return 1 if problems else 0


def _print_comparison(table: pd.DataFrame) -> None:
    columns = ["claim", "part", "statistic", "criterion"]
    for (claim, part, statistic, criterion), rows in table.groupby(columns, sort=False):
        print(f"{claim} / {part} / {statistic}\n{criterion}")
        print(rows.drop(columns=columns).to_string(index=False), end="\n\n")


def _print_claims(rows: Sequence[Record]) -> None:
    for claim, model, untrained in _claims(rows):
        try:
            found = [
                claim_verdict(rows, claim, model, untrained, held_out_only=only).verdict
                for only in (False, True)
            ]
        except ValueError:
            continue  # told among the problems
        weights = ", untrained" if untrained else ""
        print(f"{claim} ({model}{weights}): {found[0]}; on held-out tasks alone: {found[1]}")


if __name__ == "__main__":
    sys.exit(main())
