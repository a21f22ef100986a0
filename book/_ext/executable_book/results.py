"""The chapters' records: kept in step with the pages while reading, collected at the end."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from lib.engine.files import write_atomically
from lib.evidence.criteria import MODEL, POOLED, Criterion, Record, tasks_pooled
from lib.evidence.records import (
    RESULTS,
    catalogue_place,
    claim_file,
    keep_records,
    key_of,
    pages,
    read_runs,
    results_file,
    run_file,
    write_records,
)
from lib.evidence.verify import scorecard
from lib.reading.words import RECORDS_KEY


def failed_pages(env: BuildEnvironment) -> list[str]:
    """Return the pages whose execution ended with an error."""
    data = {page: NbMetadataCollector.get_exec_data(env, page) for page in sorted(env.found_docs)}
    return [page for page, execution in data.items() if execution and not execution["succeeded"]]


def records_of(env: BuildEnvironment, page: str) -> list[Record]:
    """Return the records that a page glued when it was last read; none if it failed."""
    if page in failed_pages(env):
        return []
    if RECORDS_KEY not in NbMetadataCollector.get_doc_data(env)[page].get("glue", []):
        return []
    folder = Path(env.mystnb_config.output_folder)  # type: ignore[attr-defined]
    glued = json.loads((folder / f"{page}.glue.json").read_text(encoding="utf-8"))
    rows: list[Record] = json.loads(glued[RECORDS_KEY]["data"]["text/plain"])
    return rows


def collect(env: BuildEnvironment) -> list[Record]:
    """Return all records of the book, sorted by chapter and then by their keys."""
    chapters = [page for page in pages(Path(env.srcdir)) if page in env.found_docs]
    return [
        row
        for page in chapters
        for row in sorted(
            records_of(env, page), key=lambda row: [str(part) for part in key_of(row)]
        )
    ]


def all_records(own: Sequence[Record]) -> dict[str, list[Record]]:
    """Return this build's records by model, then those kept of others, in the catalogue's order."""
    found: dict[str, list[Record]] = {}
    for row in own:
        found.setdefault(row["model"], []).append(row)
    for run in ordered_runs():
        if run["model"] not in found and run["records"]:
            found[run["model"]] = run["records"]
    return found


def place_text(criterion: Criterion, place: str, runs: Iterable[Sequence[Record]]) -> str:
    """Return where a judged number was measured: "texts", or of how many tasks it is the mean.

    Of the models' records those that judge the criterion count; empty for a number of the model.
    """
    if place != POOLED:
        return "" if place == MODEL else place
    counts = {tasks_pooled(rows, criterion) for rows in runs} - {0}
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) + " tasks" if counts else place


def ordered_runs() -> list[dict[str, Any]]:
    """Return the runs kept, in the order of the catalogue; models that are not in it come last."""
    return sorted(read_runs(), key=lambda run: catalogue_place(run["model"]))


def keep_in_step(env: BuildEnvironment, page: str) -> None:
    """Make the file from which later chapters read a page's records say what the page says."""
    rows = records_of(env, page)
    if rows:
        write_records(claim_file(rows[0]["claim"]), rows)
    else:
        claim_file(Path(page).name).unlink(missing_ok=True)


def forget_old_results(app: Sphinx) -> None:
    """Remove the results of an earlier build, so that a build cut short leaves none."""
    results_file().unlink(missing_ok=True)
    scorecard_file().unlink(missing_ok=True)


def scorecard_file() -> Path:
    """Return the file with the scorecard in text, which `make book` prints."""
    return RESULTS / "scorecard.txt"


def before_reading(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Restore the records of pages that are not read again."""
    for page in env.found_docs - set(docnames):
        keep_in_step(env, page)


def after_reading_page(app: Sphinx, doctree: nodes.document) -> None:
    """Bring the records of the page just read into step."""
    keep_in_step(app.env, app.env.docname)


def write_results(app: Sphinx, exception: Exception | None) -> None:
    """Write `results.json` and the scorecard; remove records of chapters no longer in the book."""
    if exception is not None or app.env is None:
        return
    rows = collect(app.env)
    write_records(results_file(), rows)
    write_atomically(scorecard_file(), scorecard(rows) + "\n")
    if not failed_pages(app.env):
        keep_records(rows)
    kept = {claim_file(row["claim"]) for row in rows} | {results_file(), run_file()}
    for file in RESULTS.glob("*.json"):
        if file not in kept:
            file.unlink()


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.connect("builder-inited", forget_old_results)
    app.connect("env-before-read-docs", before_reading, priority=600)  # once the order is known
    app.connect("doctree-read", after_reading_page)
    app.connect("build-finished", write_results)
