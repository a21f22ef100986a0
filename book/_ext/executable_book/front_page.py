"""The first page's picture of all models, and what each claim comes to, in a sentence."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from executable_book.displays import Picture, chapter_addresses
from executable_book.results import all_records, collect
from executable_book.scorecard import short_name
from lib.engine.files import DATA
from lib.evidence.criteria import MODEL, POOLED, Record, claim_verdict, criteria, judged
from lib.evidence.records import RESULTS, SIGNS, read_runs
from lib.evidence.transfer import ARMS
from lib.evidence.transition import CLAIM
from lib.reading.words import number_text, signed

MONTHS = "base month: transfer T"
"""The panel of the recorded months that the picture shows."""


class HandOver(Picture):
    """Show transfer against block for each model that was run and for the paper's own task.

    The content is the caption::

        ```{hand-over}
        :alt: Panels of two curves that cross.

        What it shows.
        ```
    """

    def run(self) -> list[nodes.Node]:
        """Return the figure; nothing where no model was run."""
        own = collect(self.env)
        table = curves(all_records(own), months({row["model"] for row in own}))
        if table.empty:
            return []
        # Late, as they take seconds: a build with nothing changed draws nothing.
        import matplotlib.pyplot as plt

        from lib.reading.figures import over_depth

        picture = self.place("hand-over.png")
        figure = over_depth(table, ylabel="transfer T")
        figure.savefig(picture)
        plt.close(figure)
        return [self.figure(picture)]


def curves(runs: Mapping[str, Sequence[Record]], recorded: pd.DataFrame) -> pd.DataFrame:
    """Return each model's T pooled over tasks by block, its twins', and the paper's own task.

    Args:
        runs: records by model.
        recorded: as `months`.

    Returns:
        Columns `panel`, `n_blocks`, `curve`, `untrained`, `block`, `estimate`, `low`, `high`.
    """
    depth = {run["model"]: run["n_blocks"] for run in read_runs()}
    rows = [
        {
            "panel": short_name(model),
            "n_blocks": depth[model],
            "curve": row["statistic"],
            "block": int(row["place"].removeprefix("block ")),
            **{name: row[name] for name in ("untrained", "estimate", "low", "high")},
        }
        for model, records in runs.items()
        for row in records
        if row["claim"] == CLAIM and row["statistic"] in ARMS and row["estimate"] is not None
    ]
    for row in recorded.to_dict("records"):
        own = {name: row[name] for name in ("block", "estimate", "low", "high")}
        panel = f"the paper's months, {short_name(row['model'])}"
        n_blocks = int(recorded["block"].max()) + 1
        told = {"panel": panel, "n_blocks": n_blocks, "curve": row["curve"], "untrained": False}
        rows.append(told | own)
    return pd.DataFrame(rows)


def months(models: Collection[str]) -> pd.DataFrame:
    """Return the paper's own task on a model of this build, else as recorded; empty if neither.

    Columns `model`, `curve`, `block`, `estimate`, `low`, `high`; an exchange of the base month.
    """
    for folder in (RESULTS, DATA):
        if (file := folder / "recorded-months.csv").is_file():
            found = pd.read_csv(file)
            if folder == DATA or set(found["model"]) <= set(models):  # none of an earlier build's
                return found[found["panel"] == MONTHS]
    return pd.DataFrame(columns=["model", "curve", "block", "estimate", "low", "high"])


class Answers(SphinxDirective):
    """Say what each claim comes to on the model of the build: a sentence with its numbers.

    Each line names a claim and says what was found, with `{statistic}` for the number over all
    tasks or the model's, `{statistic@place}` for another one, `{twins statistic}` for that of the
    untrained twins. Verdict and what was not met follow::

        ```{answers}
        phase-transition | It carries {context_early} early and {late_correlation@texts} late.
        ```
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the list."""
        own = collect(self.env)
        kept = all_records(own)
        addresses = chapter_addresses(self.env)
        result = nodes.bullet_list(classes=["answers"])
        for line in filter(str.strip, self.content):
            claim, _, words = (part.strip() for part in line.partition("|"))
            rows = [row for row in own if row["claim"] == claim]
            name = nodes.strong("", claim.replace("-", " ").capitalize())
            if claim in addresses:
                name = nodes.reference("", "", name, internal=True, refuri=addresses[claim])
            said = nodes.paragraph("", "", name)
            said += nodes.Text(f": {answer(claim, words, rows)}{elsewhere(claim, rows, kept)}")
            result += nodes.list_item("", said)
        return [result]


def answer(claim: str, words: str, rows: Sequence[Record]) -> str:
    """Return a claim's sentence with its numbers, its verdict, and what was not met.

    Raises:
        ValueError: the sentence names a number that the claim has no criterion for.
    """
    if not rows:
        return "no result."
    known = {one.statistic for one in criteria(claim)}
    rows = [row for row in rows if row["criterion"] and judged(row)]
    found: dict[tuple[Any, ...], Any] = {
        (row["statistic"], row["place"], row["untrained"]): row for row in rows
    }
    rows = [row for row in rows if not row["untrained"]]

    def number(match: re.Match[str]) -> str:
        twins, (statistic, _, place) = bool(match[1]), match[2].partition("@")
        if statistic not in known:
            raise ValueError(f"{claim} has no statistic {statistic!r} in its criteria.")
        places = [place] if place else [POOLED, MODEL]
        row = next(filter(None, (found.get((statistic, one, twins)) for one in places)), None)
        return "–" if row is None or row["estimate"] is None else number_text(row["estimate"])

    verdict = claim_verdict(rows, claim, rows[0]["model"]).verdict
    texts = {one.statistic: one for one in criteria(claim)}
    failed = [
        f"{texts[row['statistic']].text} ({number_text(row['estimate'])}, "
        f"wanted {texts[row['statistic']].wanted})"
        for row in rows
        if row["verdict"] == verdict and row["estimate"] is not None
    ]
    why = "" if verdict == "supported" or not failed else f"; {verdict}: {'; '.join(failed)}"
    n_judged = sum(row["verdict"] != "not testable" for row in rows)
    met = [row for row in rows if row["verdict"] == "supported"]
    n_too = sum(row["architecture"] for row in met)
    too = f" ({n_too} by untrained twins as well)" if n_too else ""
    return (
        f"{re.sub(r'{(twins )?([^}]+)}', number, words)} {SIGNS[verdict]} {verdict.capitalize()}, "
        f"{len(met)} of {n_judged} criteria met{too}{why}."
    )


def elsewhere(claim: str, rows: Sequence[Record], runs: Mapping[str, Sequence[Record]]) -> str:
    """Return the verdicts on the claim of the models that the sentence does not speak of."""
    spoken = {row["model"] for row in rows}
    found = {
        short_name(model): claim_verdict(own, claim, model).verdict
        for model, own in runs.items()
        if model not in spoken and any(row["claim"] == claim and row["criterion"] for row in own)
    }
    said = ", ".join(f"{name} {signed(verdict)}" for name, verdict in found.items())
    return f" On others: {said}." if found else ""


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.add_directive("hand-over", HandOver)
    app.add_directive("answers", Answers)
