"""What a chapter needs of its notebook: setup, computed words for the prose, records, answers.

Everything here runs with IPython alone, so a chapter also runs where the book's tools are absent.
What is glued reaches the prose by its name: `{glue:text}`name`` for a number or a word,
```{glue:figure} name``` for a figure, ```{glue} name``` for a table.
"""

import base64
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats

from lib.engine.files import ROOT
from lib.evidence.criteria import (
    MODEL,
    POOLED,
    Criterion,
    Record,
    claim_verdict,
    criteria,
    judged,
    tasks_pooled,
)
from lib.evidence.records import check, claim_file, keep_run, to_json, write_records
from lib.reading.figures import forest
from lib.reading.words import RECORDS_KEY, estimate_text, number_text, record_text, verdict_text
from lib.science.estimate import Measured

if TYPE_CHECKING:
    from lib.engine.models import Decoder

_GLUE_PREFIX = "application/papermill.record/"
_GLUED = re.compile(r"\{glue:text\}`([^`:]+)(?::([^`]*))?`")
_values: dict[str, str | int | float] = {}
_incomplete: list[str] = []

SETUP_CELL = """\
# Setup: find the project, or clone it; on Colab, install what Colab lacks.
import subprocess
import sys
from pathlib import Path

REPOSITORY, REVISION = "{repository}", "{revision}"

clone = Path(REPOSITORY.rsplit("/", 1)[-1]).resolve()
folders = [Path.cwd(), *Path.cwd().parents, clone]
root = next((one for one in folders if (one / "lib/reading").is_dir()), None)
if root is None:
    options = ["--quiet", "--depth", "1", "--branch", REVISION]
    subprocess.run(["git", "clone", *options, REPOSITORY, str(clone)], check=True)
    root = clone
if str(root) not in sys.path:
    sys.path.insert(0, str(root))

from lib.reading import notebook

notebook.prepare()
"""
"""First code cell of every chapter. `make notebooks` fills in `repository.url` and
`repository.branch` of _config.yml and writes the cell into the chapters."""


def prepare() -> None:
    """Ready the session: sharp figures, and on Colab gguf, the one package that is missing there.

    It is installed at the version of requirements.txt and without its dependencies, so that Colab's
    own numpy and torch stay as they are.

    Raises:
        RuntimeError: if the installation fails.
    """
    if _in_notebook():
        set_matplotlib_formats("retina")
    if "google.colab" not in sys.modules or find_spec("gguf"):
        return
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (gguf,) = (line for line in pinned if line.startswith("gguf=="))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", gguf]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Could not install {gguf}: {done.stderr.strip()}")


def model_name(default: str = "embedded") -> str:
    """Return the model to run the chapter on: the environment variable MODEL, else `default`.

    A folder is named from the project's on, wherever the chapter is executed.
    """
    name = os.environ.get("MODEL") or default
    return str(ROOT / name) if (ROOT / name).is_dir() else name


def glue(name: str, value: Any, fmt: str = "") -> None:
    """Make a computed value available to the prose, as {glue:text}`name`.

    It needs IPython alone, so a chapter also runs where the book's tools are absent. Outside a
    notebook nothing happens.

    Args:
        name: key of the value, unique within the chapter.
        value: a number, string or bool; NumPy scalars are taken for what they hold.
        fmt: format specification applied now, such as ".2f". Without one the role may
            carry it: {glue:text}`name:.2f`.

    Raises:
        ValueError: if the value is NaN or infinite, or neither number nor text.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"glue {name!r}: expected a number or text, got {type(value).__name__}. "
            "Reduce it to one value or format it first."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"glue {name!r}: the value is {value}. Say in words what is missing.")
    if fmt:
        value = f"{value:{fmt}}"
    _display({f"{_GLUE_PREFIX}text/plain": repr(value)}, _glue_metadata(name))
    _values[name] = value
    for text in [text for text in _incomplete if not _missing(text)]:
        show_text(text)


def show_text(text: str) -> None:
    """Display Markdown with glued values filled in.

    The notebooks for Colab, which knows no roles, hold such cells where a chapter's prose has
    {glue:text}`name`. A text some of whose values are still to come is shown with dots in their
    place, and in full below the cell that glues the last of them; where the front end can change
    what it has shown, the first one is filled in, too.

    Args:
        text: Markdown, with roles for the values.
    """
    filled = _GLUED.sub(
        lambda role: format(_values[role[1]], role[2] or "") if role[1] in _values else "…", text
    )
    if text in _incomplete:
        _incomplete.remove(text)
    if _missing(text):
        _incomplete.append(text)
        filled += "\n\n*The dots stand for what is computed further down, and is then shown there.*"
    data = {"text/markdown": filled, "text/plain": filled}
    _display(data, display_id=sha256(text.encode()).hexdigest())


def _missing(text: str) -> bool:
    return any(role[1] not in _values for role in _GLUED.finditer(text))


def glue_estimates(estimates: Mapping[str, Measured]) -> None:
    """Glue numbers with their 95 % intervals, such as "0.62 [0.55, 0.68]", each by its name.

    One that could not be measured reads "not testable (reason)".

    Raises:
        ValueError: an estimate of several numbers.
    """
    for name, one in estimates.items():
        glue(name, estimate_text(one))


def glue_figure(name: str, figure: Figure) -> None:
    """Glue a figure, to be pasted by the directive glue:figure; nothing is shown in its place.

    Where prose knows no directives, as on Colab, it is shown by `show_glued`.
    """
    _glue_output(name, _png(figure))


def _png(figure: Figure) -> dict[str, str]:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)  # else IPython shows it below the cell as well
    return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<a figure>"}


def glue_html(name: str, html: str, text: str) -> None:
    """Glue a piece of HTML, to be pasted by the directive glue; nothing is shown in its place.

    Args:
        name: key, unique within the chapter.
        html: what is pasted.
        text: the same for readers without HTML.
    """
    _glue_output(name, {"text/html": html, "text/plain": text})


_outputs: dict[str, dict[str, str]] = {}
_awaited: set[str] = set()


def show_glued(name: str) -> None:
    """Display what is glued as `name`; where it is still to come, as soon as it is there.

    The notebooks for Colab hold such cells where a chapter pastes a figure or a table.
    """
    if name not in _outputs:
        _awaited.add(name)
        note = f"*What stands here ({name}) is computed further down, and is then shown there.*"
        _display({"text/markdown": note, "text/plain": note}, display_id=f"glued-{name}")
        return
    _display(dict(_outputs[name]), display_id=f"glued-{name}")


def _glue_output(name: str, data: dict[str, str]) -> None:
    _display({f"{_GLUE_PREFIX}{mime}": value for mime, value in data.items()}, _glue_metadata(name))
    _outputs[name] = data
    if name in _awaited:
        _awaited.discard(name)
        show_glued(name)


def conclude(records: Sequence[Record], decoder: "Decoder | None" = None) -> None:
    """Record a chapter's verdicts, glue each of them, and show them all. Called once, at the end.

    Glued are: `verdict`, the claim's word, and for each part `part-name.verdict`; for each record
    `statistic.place`, its number with interval, `statistic.place.verdict` and `statistic.place.n`
    (spaces become hyphens: `context_early.all-tasks`; the twins' end in `.twins`); and `answer`,
    the table of the claim's statistics. Shown are the table of all records and their forest.

    Args:
        records: of `judge`, and of `shown` where the claim has numbers without a criterion.
        decoder: the model, to keep the facts of its run; the first chapter does.

    Raises:
        ValueError: records of several claims or models, or such as `lib.evidence.records.check`
            refuses.
    """
    rows = check(records)
    kinds = sorted({(row["claim"], row["model"]) for row in rows})
    if len(kinds) != 1:
        raise ValueError(f"Expected records of one claim on one model, got {kinds or 'none'}.")
    claim, model = kinds[0]
    write_records(claim_file(claim), rows)
    if decoder is not None:
        keep_run(decoder)
    _display({f"{_GLUE_PREFIX}text/plain": to_json(rows)}, _glue_metadata(RECORDS_KEY))
    for row in rows:
        name = f"{row['statistic']}.{row['place']}{'.twins' if row['untrained'] else ''}"
        name = name.replace(" ", "-")
        glue(name, record_text(row))
        glue(f"{name}.verdict", row["verdict"])
        glue(f"{name}.n", row["n"])
    found = claim_verdict(rows, claim, model)
    glue("verdict", found.verdict)
    for part, verdict in found.parts.items():
        glue(f"{part.replace(' ', '-').replace(',', '')}.verdict", verdict)
    answer = answer_table(rows, claim)
    caption = f"The answer on {model}: each statistic against its criterion"
    glue_html("answer", table_html(answer, caption), answer.to_string(index=False))
    show_table(verdict_table(rows), f"All records of the claim “{claim.replace('-', ' ')}”")
    _display(_png(forest(rows)))


def answer_table(rows: Sequence[Record], claim: str) -> pd.DataFrame:
    """Return a claim's judged statistics, a row each: trained, twins, criterion, verdict."""
    own = {(row["statistic"], row["place"], row["untrained"]): row for row in rows if judged(row)}
    result = []
    for criterion in criteria(claim):
        for (statistic, place, untrained), row in own.items():
            if statistic == criterion.statistic and not untrained:
                twin = own.get((statistic, place, True))
                result.append(_answer_row(criterion, row, twin, tasks_pooled(rows, criterion)))
    return pd.DataFrame(result)


def _answer_row(
    criterion: Criterion, row: Record, twin: Record | None, n_tasks: int
) -> dict[str, str]:
    place = {MODEL: "", POOLED: f", {n_tasks} tasks"}.get(row["place"], f", {row['place']}")
    twins = "compared" if criterion.comparative else "–"
    why = f" ({row['reason']})" if row["reason"] and row["estimate"] is not None else ""
    if twin is not None and twin["estimate"] is not None:
        twins = record_text(twin)
    return {
        "part": criterion.part,
        "statistic": f"{criterion.statistic.replace('_', ' ')}{place}",
        "trained": record_text(row),
        "untrained twins": twins,
        "criterion": f"{criterion.wanted} {_UNITS.get(criterion.unit, criterion.unit)}".strip(),
        "verdict": verdict_text(row) + why,
    }


_UNITS = {"T": "", "ρ": "", "share": "", "ratio": "", "score": "", "L": "L"}


def verdict_table(rows: Sequence[Record]) -> pd.DataFrame:
    """Return all records, a row each, the judged ones first."""
    ordered = sorted(rows, key=lambda row: (row["untrained"], not judged(row)))
    return pd.DataFrame(
        {
            "part": row["part"],
            "statistic": row["statistic"].replace("_", " "),
            "place": row["place"] + ("" if row["held_out"] or judged(row) else " (seen)"),
            "estimate [interval]": record_text(row),
            "level": f"{100 * row['level']:.0f} %",
            "n": row["n"],
            "model": "untrained twins" if row["untrained"] else row["model"],
            "criterion": row["criterion"],
            "verdict": verdict_text(row)
            + (f": {row['reason']}" if row["estimate"] is not None and row["reason"] else ""),
        }
        for row in ordered
    )


def show_table(table: pd.DataFrame, caption: str) -> None:
    """Display a table that scrolls sideways on a narrow screen and reads well aloud.

    Args:
        table: cells are shown as they are, numbers with two decimals; the index is left out.
        caption: says what the table shows; stands above it.
    """
    _display({"text/html": table_html(table, caption), "text/plain": table.to_string(index=False)})


def table_html(table: pd.DataFrame, caption: str) -> str:
    """Return the HTML of `show_table`."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in table.columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>"
        for row in table.itertuples(index=False, name=None)
    )
    return (
        f'<div class="table-scroll" style="overflow-x: auto" role="region" tabindex="0" '
        f'aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return number_text(float(value)) if isinstance(value, float | np.floating) else str(value)


def _glue_metadata(name: str) -> dict[str, Any]:
    return {"scrapbook": {"name": name, "mime_prefix": _GLUE_PREFIX}}


def _in_notebook() -> bool:
    return bool(InteractiveShell.initialized())


def _display(
    data: dict[str, Any], metadata: dict[str, Any] | None = None, display_id: str | None = None
) -> None:
    if _in_notebook():
        display(data, raw=True, metadata=metadata or {}, display_id=display_id)
