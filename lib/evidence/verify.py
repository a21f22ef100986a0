"""Compares a build's records with the recorded ones: `python -m lib.evidence.verify [--update]`."""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.engine.catalogue import ALIASES, results_name
from lib.evidence.criteria import (
    ClaimVerdict,
    Record,
    claim_verdict,
    criteria,
    judged,
    registration,
    without_record,
)
from lib.evidence.records import (
    SIGNS,
    key_of,
    pages,
    read_records,
    record_run,
    recorded_file,
    recorded_files,
    results_file,
    run_folder,
)
from lib.science.estimate import is_own

NUMBERS = ("estimate", "low", "high")


def verify(
    rows: Sequence[Record], recorded: Sequence[Record], chapters: Iterable[str]
) -> list[str]:
    """Return what is wrong with the records of a build, a line each; none if nothing is.

    Args:
        rows: the records of the build, of all its models: a chapter may train its own.
        recorded: those that were reviewed and kept, of the same models.
        chapters: the claims whose chapters are in the book; each owes records.
    """
    problems = []
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
    there = {row["claim"] for row in rows}
    problems += [
        f"{claim}: no records; its chapter failed or was not built"
        for claim in chapters
        if claim not in there
    ]
    for claim, model, untrained in _claims(rows):
        try:
            found = claim_verdict(rows, claim, model, untrained=untrained)
        except ValueError as error:
            problems.append(str(error))
            continue
        if untrained and found.verdict == "supported":
            problems.append(f"{claim}: its untrained twins support it, so it is no evidence")
    return problems


def difference(now: Record, before: Record) -> str:
    """Return in what a record differs from the recorded one beyond tolerance; empty if in nothing.

    Verdict and criterion have to be the same, numbers within the tolerance of criteria.toml. A
    single task's verdict may pass to or from undecided where its numbers moved at all: on Gemma one
    did by 3e-6, since an interval at Bonferroni's level ended at its threshold. Where tasks refute
    what is pooled, the pooled verdict shows it, and that has to be the same.
    """
    moved = any(now[field] != before[field] for field in NUMBERS)
    step = "undecided" in (now["verdict"], before["verdict"])
    stepped = step and moved and not judged(before)
    if now["verdict"] != before["verdict"] and not stepped:
        return f"{now['verdict']} now, {before['verdict']} as recorded"
    if now["criterion"] != before["criterion"]:
        return f"{now['criterion']!r} is wanted now, {before['criterion']!r} as recorded"
    allowed = tolerance(before)
    for field in NUMBERS:
        value, old = now[field], before[field]
        if (value is None) != (old is None) or (
            value is not None and not abs(value - old) <= allowed
        ):
            return (
                f"{field} {_number(value)} now, {_number(old)} as recorded; {allowed:.2g} is "
                "allowed"
            )
    return ""


def tolerance(row: Record) -> float:
    """Return how far a number may be from a recorded one."""
    stated = registration()["tolerance"]
    if row["low"] is None:
        return float(stated["absolute"])
    share = stated["share_where_trained"].get(row["claim"], stated["share_of_interval"])
    return float(max(stated["absolute"], share * (row["high"] - row["low"])))


def changes(rows: Sequence[Record], recorded: Sequence[Record]) -> list[str]:
    """Return what recording anew would change, a line for each record."""
    now = {key_of(row): row for row in rows}
    before = {key_of(row): row for row in recorded}
    lines = [f"+ {name_of(row)}: {_values(row)}" for key, row in now.items() if key not in before]
    lines += [f"- {name_of(row)}: {_values(row)}" for key, row in before.items() if key not in now]
    return lines + [
        f"~ {name_of(row)}: {_values(before[key])} -> {_values(row)}"
        for key, row in now.items()
        if key in before and row != before[key]
    ]


def scorecard(rows: Sequence[Record]) -> str:
    """Return the verdicts as a table of text: a line for each claim, one for each of its parts."""
    table = []
    for claim, model, untrained in _claims(rows):
        if untrained:
            continue
        try:
            found = claim_verdict(rows, claim, model)
        except ValueError:
            continue  # told among the problems
        twins = _twins(rows, claim, model)
        table.append(_line(claim, found.verdict, twins.verdict if twins else None))
        for part, verdict in found.parts.items():
            table.append(_line(f"  {part}", verdict, twins.parts[part] if twins else None))
    if not table:
        return "No claim has been judged."
    lines = [["claim", "verdict", "untrained twins"], *table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _line(name: str, verdict: str, twins: str | None) -> list[str]:
    cells = [f"{SIGNS[one]} {one}" if one else "" for one in (verdict, twins)]
    return [name, *cells]


def _twins(rows: Sequence[Record], claim: str, model: str) -> ClaimVerdict | None:
    try:
        return claim_verdict(rows, claim, model, untrained=True)
    except ValueError:
        return None


def _claims(rows: Sequence[Record]) -> list[tuple[str, str, bool]]:
    """Return the claims that have records, in the order of the criteria, with model and twins."""
    order = list(dict.fromkeys(one.claim for one in criteria()))
    found = {(row["claim"], row["model"], row["untrained"]) for row in rows if row["criterion"]}
    return sorted(found, key=lambda one: (order.index(one[0]), *one[1:]))


def name_of(row: Mapping[str, Any]) -> str:
    """Return a record's name as messages quote it."""
    weights = "untrained" if row["untrained"] else "trained"
    return f"{row['claim']} / {row['statistic']} / {row['place']} ({weights})"


def _values(row: Mapping[str, Any]) -> str:
    estimate, low, high = (_number(row[field]) for field in NUMBERS)
    return f"{estimate} [{low}, {high}], {row['verdict']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def outdated(rows: Sequence[Record]) -> list[str]:
    """Return what of a model's recorded results the present criteria do not allow, a line each.

    Nothing is computed anew: each judged number has to have its criterion, each criterion of its
    claim a number, and no verdict may go against its own interval.
    """
    problems = [
        f"{rows[0]['model']}: {one.claim} / {one.statistic}: no record of this criterion; run the "
        "model again"
        for one in without_record(rows)
    ]
    known = {(one.claim, one.statistic): one for one in criteria()}
    for row in (row for row in rows if row["criterion"]):
        criterion = known.get((row["claim"], row["statistic"]))
        name = f"{row['model']}: {name_of(row)}"
        if criterion is None:
            problems.append(f"{name}: recorded, but no criterion names it now")
        elif criterion.wanted != row["criterion"]:
            problems.append(
                f"{name}: {criterion.wanted!r} is wanted now, {row['criterion']!r} then"
            )
        elif row["low"] is not None:
            found = criterion.verdict(row["low"], row["high"])
            if {found, row["verdict"]} == {"supported", "refuted"} or (
                row["verdict"] == "supported" != found
            ):
                problems.append(f"{name}: {row['verdict']} as recorded, its interval says {found}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scorecard and what is wrong; return the exit code: 0 only when nothing is.

    What is compared are the records of the last build; where MODEL names a model that it was not
    on, those that the last whole run of that model left.
    """
    parser = argparse.ArgumentParser(prog="python -m lib.evidence.verify", description=__doc__)
    parser.add_argument("--update", action="store_true", help="record the present results")
    update = parser.parse_args(arguments).update
    rows, named = read_records(results_file()), os.environ.get("MODEL", "")
    whole = results_file().is_file()
    if named and named not in ALIASES and results_name(named) not in {r["model"] for r in rows}:
        rows, whole = read_records(run_folder(results_name(named)) / "results.json"), False
        if not rows:
            print(f"No results of {named}: run `make book MODEL={named}`.")
            return 1
    elif not whole:
        print("No results: the book was not built, or its build was cut short. Run `make book`.")
        return 1
    if names := sorted({row["place"] for row in rows if is_own(row["place"])}):
        print(f"Not compared, for a reader's own tasks have no record: {', '.join(names)}.\n")
    rows = [row for row in rows if not is_own(row["place"])]
    print(scorecard(rows), end="\n\n")
    problems = [] if rows else ["the build left no records"]
    claims = {one.claim for one in criteria()} if whole else set()
    chapters = [claim for claim in (Path(page).name for page in pages()) if claim in claims]
    recorded = []
    for model in sorted({row["model"] for row in rows}):
        own = [row for row in rows if row["model"] == model]
        before = read_records(recorded_file(model))
        if update:
            print("\n".join(changes(own, before)) or "Nothing changed.")
            record_run(model, own)
            before = own
        elif not before:
            problems.append(f"{model}: nothing to compare with; UPDATE=1 records these results")
            before = own
        recorded += before
    if rows:
        problems += verify(rows, recorded, chapters)
    for file in recorded_files():
        problems += outdated(read_records(file))
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(rows)} records, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
