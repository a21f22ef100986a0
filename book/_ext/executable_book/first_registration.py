"""The appendix on the first registration: its criteria and verdicts, and what became of them."""

import csv
import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from executable_book.displays import table
from executable_book.results import collect
from lib.engine.files import DATA
from lib.evidence.criteria import Record, judged
from lib.reading.words import signed

FOLDER = DATA / "first-registration"
HEAD = ["Claim", "Criterion of the first registration", "Model", "Untrained", "Why it left"]
HEAD += ["Now", "Verdict now"]


class FirstRegistration(SphinxDirective):
    """Show each criterion of the first registration: its verdicts, its fate, today's verdict."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        return [table(HEAD, fates(collect(self.env)), "first-registration")]


def fates(now: Sequence[Record]) -> list[list[str]]:
    """Return a row of text for each criterion of the first registration, as `HEAD` names them.

    Raises:
        ValueError: a criterion whose fate is not told.
    """
    old = tomllib.loads((FOLDER / "criteria.toml").read_text(encoding="utf-8"))["criterion"]
    rows = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    with (FOLDER / "fates.csv").open(encoding="utf-8", newline="") as file:
        told = {(row["claim"], row["statistic"]): row for row in csv.DictReader(file)}
    result = []
    for criterion in old:
        key = criterion["claim"], criterion["statistic"]
        if key not in told:
            raise ValueError(f"fates.csv does not say why {' / '.join(key)} left.")
        own = [row for row in rows if (row["claim"], row["statistic"]) == key]
        became = told[key]["now"]
        result.append(
            [
                criterion["claim"],
                criterion["text"],
                *(
                    _counted([row for row in own if row["untrained"] is flag])
                    for flag in (False, True)
                ),
                told[key]["reason"],
                became.replace("_", " ") or "–",
                _now(now, key[0], became),
            ]
        )
    return result


def _counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdicts on one statistic, with the number of tasks of each where several."""
    counts = Counter(row["verdict"] for row in rows)
    if len(rows) == 1:
        return str(rows[0]["verdict"])
    return ", ".join(f"{verdict}: {number}" for verdict, number in counts.most_common()) or "–"


def _now(rows: Sequence[Record], claim: str, statistic: str) -> str:
    found = [
        row
        for row in rows
        if (row["claim"], row["statistic"], row["untrained"]) == (claim, statistic, False)
        and judged(row)
    ]
    several = len(found) > 1
    return (
        "; ".join(
            signed(row["verdict"]) + (f" ({row['place']})" if several else "") for row in found
        )
        or "–"
    )


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.add_directive("first-registration", FirstRegistration)
