"""The appendix that lays the models' runs side by side, as soon as there are several."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from executable_book.tables import table
from lib.evidence.runs import read_runs, relative_depths

ONE = "There is one run so far, that of {model}; with a second one its depths will stand beside it."
NONE = "There is no run yet."


class ModelComparison(SphinxDirective):
    """Shows what the runs were and, for several, where on relative depth each task's switch lies.

    It reads what the phase-transition chapter kept of each model in `_build/runs`.
    """

    def run(self) -> list[nodes.Node]:
        """Returns the tables, or a sentence where there is nothing to compare."""
        runs = read_runs()
        if not runs:
            return [nodes.paragraph("", NONE)]
        head = ["Model", "Revision", "Dtype", "Device", "Blocks", "Versions"]
        facts = [
            [
                *(str(run[key]) for key in ("model", "revision", "dtype", "device", "n_blocks")),
                ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
            ]
            for run in runs
        ]
        found: list[nodes.Node] = [_text_table(head, facts)]
        if len(runs) == 1:
            return [nodes.paragraph("", ONE.format(model=runs[0]["model"])), *found]
        depths = relative_depths(runs)
        models = [run["model"] for run in runs]
        cells = {
            (row.task, row.model): f"{row.depth:.2f} [{row.low:.2f}, {row.high:.2f}], n = {row.n}"
            for row in depths.itertuples()
        }
        tasks = sorted(set(depths["task"]))
        rows = [[task, *(cells.get((task, model), "–") for model in models)] for task in tasks]
        medians = depths.groupby("model")["depth"].median()
        rows.append(["median", *(f"{medians[m]:.2f}" if m in medians else "–" for m in models)])
        return [_text_table(["Task", *models], rows), *found]


def _text_table(head: list[str], rows: list[list[str]]) -> nodes.Node:
    return table(head, [[[nodes.Text(cell)] for cell in row] for row in rows], "scorecard")


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.add_directive("model-comparison", ModelComparison)
