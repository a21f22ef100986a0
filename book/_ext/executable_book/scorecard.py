"""The landing page's table of verdicts: a row for each claim, a column for each model."""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from executable_book.results import records_of
from executable_book.tables import table
from lib.evidence.results import Record, pages
from lib.evidence.verdicts import claim_verdict

COMING = "chapter to come"
NO_RESULT = "no result"


class Scorecard(SphinxDirective):
    """Shows the verdict on each claim, for each model and its untrained twin.

    Each line of the content names a claim, which is also the name of its chapter, and says it in
    words::

        ```{scorecard}
        phase-transition: Depth switches sharply from context to prediction.
        ```

    Beside the verdict stands that on the tasks alone that were not seen while the criteria were
    chosen. The verdicts come from the records that the chapters glued, so the page with the
    scorecard has to be read after all chapters.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Returns the table."""
        claims = dict(self._claim(line) for line in self.content if line.strip())
        chapters = {Path(page).name: page for page in pages(Path(self.env.srcdir))[1:]}
        records = {
            claim: records_of(self.env, chapters[claim]) for claim in claims if claim in chapters
        }
        models = sorted({_model(row) for rows in records.values() for row in rows})
        rows = []
        for claim, words in claims.items():
            if claim in chapters:
                first = [self._link(chapters[claim], words)]
                cells = [self._verdict(claim, records[claim], model) for model in models]
                cells = cells or [NO_RESULT]
            else:
                first = [nodes.Text(words)]
                cells = [COMING] * max(1, len(models))
            rows.append([first, *([nodes.Text(cell)] for cell in cells)])
        heads = [model_text(model) for model in models] or ["Verdict"]
        return [table(["Claim", *heads], rows, "scorecard")]

    def _claim(self, line: str) -> tuple[str, str]:
        claim, separator, words = line.partition(":")
        if not separator:
            raise self.error(f"Expected 'claim: the claim in words', got {line!r}.")
        return claim.strip(), words.strip()

    def _verdict(self, claim: str, rows: list[Record], model: tuple[str, bool]) -> str:
        if not any(_model(row) == model for row in rows):
            return NO_RESULT
        try:
            found = claim_verdict(rows, claim, *model)
            held_out = claim_verdict(rows, claim, *model, held_out_only=True)
        except ValueError as problem:
            raise self.error(str(problem)) from problem
        parts = "; ".join(f"{part}: {verdict}" for part, verdict in found.parts.items())
        verdict = f"{found.verdict} ({parts})" if len(found.parts) > 1 else found.verdict
        return f"{verdict}; on held-out tasks alone: {held_out.verdict}"

    def _link(self, page: str, words: str) -> nodes.Node:
        link = addnodes.pending_xref(
            refdomain="std",
            reftype="doc",
            reftarget=f"/{page}",
            refdoc=self.env.docname,
            refexplicit=True,
            refwarn=True,
        )
        link += nodes.inline("", words)
        return link


def model_text(model: tuple[str, bool]) -> str:
    """Returns the head of a model's column."""
    name, untrained = model
    return f"{name}, untrained" if untrained else name


def _model(row: Record) -> tuple[str, bool]:
    return row["model"], row["untrained"]


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.add_directive("scorecard", Scorecard)
