"""The appendix that lays the models' runs side by side, as soon as there are several."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from executable_book.displays import Picture, table
from executable_book.results import all_records, collect, ordered_runs, place_text
from executable_book.scorecard import colour_of, short_name
from lib.evidence.criteria import (
    MODEL,
    POOLED,
    TEXTS,
    ClaimVerdict,
    Record,
    claim_verdict,
    criteria,
)
from lib.evidence.records import SIGNS
from lib.evidence.transition import CLAIM, STATISTIC
from lib.reading.words import number_text, signed, table_text
from lib.science.estimate import is_own

ONE = "There is one run so far, that of {model}; with a second one its depths will stand beside it."
NONE = "There is no run yet."
NOT_MASTERED = "No model that was run masters {task}."
ARCHITECTURE = " ⚑"
"""The mark of what untrained twins meet as well."""
_INDENT = "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}"
_EXPECTED = (TEXTS, POOLED, MODEL)


class ModelComparison(SphinxDirective):
    """Show the runs kept: each model's verdicts, where its switches lie, and what the run was."""

    def run(self) -> list[nodes.Node]:
        """Return the tables, or a sentence where there is nothing to compare."""
        runs, _ = kept_runs(self.env)
        if not runs:
            return [nodes.paragraph("", NONE)]
        models = [short_name(run["model"]) for run in runs]
        head = ["Model", "Source", "Revision", "Dtype", "Device", "Blocks", "Versions"]
        told = ("model", "source", "revision", "dtype", "device", "n_blocks")
        facts = [
            [
                *(str(run[key]) for key in told),
                ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
            ]
            for run in runs
        ]
        found = [
            table(["Claim, part", *models], verdict_rows(runs), "models"),
            table(["Effect", "Wanted", *models], effect_rows(runs), "models"),
            table(["Task", *models], depth_rows(runs), "models"),
            table(head, facts, "models"),
        ]
        if len(runs) == 1:
            return [nodes.paragraph("", ONE.format(model=models[0])), *found]
        said = [nodes.list_item("", nodes.paragraph("", one)) for one in agreement(runs)]
        return [nodes.bullet_list("", *said), *found]


class TaskComparison(SphinxDirective):
    """Show what the models that master one task, the argument, do on it, by the same criteria."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table, or a sentence where no model masters the task."""
        (task,) = self.arguments
        runs = [run for run in kept_runs(self.env)[0] if _is_mastered(run, task)]
        if not runs:
            return [nodes.paragraph("", NOT_MASTERED.format(task=task))]
        models = [short_name(run["model"]) for run in runs]
        return [table(["Effect", "Wanted", *models], effect_rows(runs, [task]), "models")]


def _is_mastered(run: Mapping[str, Any], task: str) -> bool:
    """Return whether a model does a task well enough for the hand-over to be measured on it."""
    return any(
        (row["claim"], row["place"], row["untrained"]) == (CLAIM, task, False)
        and row["criterion"]
        and row["estimate"] is not None
        for row in run["records"]
    )


class RelativeDepths(Picture):
    """Show where each task's switch lies on the relative depth of each model.

    The content is the caption::

        ```{relative-depths}
        :alt: A point for each task and model.

        What it shows.
        ```
    """

    def run(self) -> list[nodes.Node]:
        """Return the figure; nothing where no transition was found."""
        runs, models = kept_runs(self.env)
        table = relative_depths(runs)
        if table.empty:
            return []
        # Late, as they take seconds: a build with nothing changed draws nothing.
        import matplotlib.pyplot as plt

        from lib.reading.phase_transition_figures import depths_by_model

        colours = {short_name(model): colour_of(model, models) for model in models}
        picture = self.place("relative-depths.png")
        figure = depths_by_model(table, colours)
        figure.savefig(picture)
        plt.close(figure)
        return [self.figure(picture)]


def kept_runs(env: BuildEnvironment) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the runs kept, each with its records, and all models that have records.

    A reader's own tasks are left out: runs are compared on the book's.
    """
    own = all_records([row for row in collect(env) if not is_own(row["place"])])
    return [{**run, "records": own.get(run["model"], [])} for run in ordered_runs()], list(own)


def verdict_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each claim and each of its parts: its name, and a verdict a model."""
    rows = []
    for claim in dict.fromkeys(one.claim for one in criteria()):
        found, untrained = (
            [_verdict_on(claim, run, untrained=untrained) for run in runs]
            for untrained in (False, True)
        )
        if not any(found):
            continue
        rows.append([claim, *(signed(one.verdict) if one else "–" for one in found)])
        for part in dict.fromkeys(one.part for one in criteria(claim)):
            pairs = zip(found, untrained, strict=True)
            cells = [_part_cell(one, twins, part) if one else "–" for one, twins in pairs]
            rows.append([f"{_INDENT}{part}", *cells])
    return rows


def _part_cell(found: ClaimVerdict, twins: ClaimVerdict | None, part: str) -> str:
    """Return a part's verdict, marked where the untrained twins have it supported too."""
    met = found.parts[part] == "supported" and twins and twins.parts[part] == "supported"
    return signed(found.parts[part]) + (ARCHITECTURE if met else "")


def _verdict_on(claim: str, run: Mapping[str, Any], *, untrained: bool) -> ClaimVerdict | None:
    """Return a run's verdict on a claim, of the model or of its twins; None where it has none."""
    own = [row for row in run["records"] if row["claim"] == claim and row["criterion"]]
    if not any(row["untrained"] == untrained for row in own):
        return None
    return claim_verdict(own, claim, run["model"], untrained=untrained)


def agreement(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words on which parts of which claims the models agree, and on which they do not.

    A part that the untrained twins of all of them have supported, too, is marked.
    """
    found: dict[str, dict[str, list[str]]] = {}
    claim = ""
    for label, *cells in verdict_rows(runs):
        if not label.startswith(_INDENT):
            claim = label.replace("-", " ")
            continue
        told = [cell for cell in cells if cell != "–"]  # of the models on which the claim was run
        verdicts = {cell.removesuffix(ARCHITECTURE).split(" ", 1)[-1] for cell in told}
        kind = f"On all {len(told)} models {next(iter(verdicts))}"
        if {"supported", "refuted"} <= verdicts:
            kind = "Supported on one, refuted on another"
        elif len(verdicts) > 1:
            kind = "Decided on some alone"
        part = label.removeprefix(_INDENT)
        if all(cell.endswith(ARCHITECTURE) for cell in told):
            part += ARCHITECTURE
        found.setdefault(kind, {}).setdefault(claim, []).append(part)
    return [
        f"{kind}: " + "; ".join(f"{name}: {', '.join(own)}" for name, own in claims.items()) + "."
        for kind, claims in sorted(found.items(), reverse=True)
    ]


def effect_rows(
    runs: Sequence[Mapping[str, Any]], places: Sequence[str] = _EXPECTED
) -> list[list[str]]:
    """Return a row for each judged number: what it is, what is wanted, and each model's.

    Or of one task, its name the place.

    A number stands with its interval, its verdict's sign, the mark of architecture where the twins
    meet the criterion as well, and the twins' number.
    """
    rows = []
    for criterion in criteria():
        for place in places:
            cells = []
            for run in runs:
                own = {
                    row["untrained"]: row
                    for row in run["records"]
                    if (row["claim"], row["statistic"], row["place"])
                    == (criterion.claim, criterion.statistic, place)
                }
                twin = own.get(True)
                cell = _cell(own[False]) if False in own else "–"
                if twin and twin["estimate"] is not None:
                    cell += f"; twins {number_text(twin['estimate'])}"
                cells.append(cell)
            if set(cells) != {"–"}:
                at = place_text(criterion, place, [run["records"] for run in runs])
                known = f" ({at})" if at and places is _EXPECTED else ""
                rows.append([f"{criterion.text}{known}", criterion.wanted, *cells])
    return rows


def _cell(row: Record) -> str:
    sign = SIGNS[row["verdict"]]
    if row["estimate"] is None:
        return f"{sign} not testable"
    met = row["architecture"] and row["verdict"] == "supported"
    return f"{sign} {table_text(row)}{ARCHITECTURE if met else ''}"


def relative_depths(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return each task's transition as a share of each model's depth, ℓ* / (L − 1).

    Returns:
        Columns `task`, `model` (its short name), `estimate`, `low`, `high`, `n`.
    """
    rows = [
        {"task": row["place"], "model": short_name(run["model"]), "n": row["n"]}
        | {field: row[field] / (run["n_blocks"] - 1) for field in ("estimate", "low", "high")}
        for run in runs
        for row in run["records"]
        if (row["claim"], row["statistic"]) == (CLAIM, STATISTIC)
        and not row["untrained"]
        and row["estimate"] is not None
    ]
    return pd.DataFrame(rows, columns=["task", "model", "estimate", "low", "high", "n"])


def depth_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each task: its transition's relative depth by model; and the medians."""
    table = relative_depths(runs)
    models = [short_name(run["model"]) for run in runs]
    cells = {
        (row.task, row.model): f"{row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n}"
        for row in table.itertuples()
    }
    medians = table.groupby("model")["estimate"].median()
    tasks = sorted(set(table["task"]))
    return [
        *([task, *(cells.get((task, one), "–") for one in models)] for task in tasks),
        ["median", *(f"{medians[one]:.2f}" if one in medians else "–" for one in models)],
    ]


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.add_directive("model-comparison", ModelComparison)
    app.add_directive("task-comparison", TaskComparison)
    app.add_directive("relative-depths", RelativeDepths)
