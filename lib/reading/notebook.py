"""What a chapter needs of its notebook: setup, computed words for the prose, verdict records."""

import math
import os
import re
import subprocess
import sys
from hashlib import sha256
from html import escape
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from matplotlib_inline.backend_inline import set_matplotlib_formats

from lib.evidence.results import (
    ROOT,
    Record,
    plain,
    read_records,
    records_file,
    to_json,
    to_rows,
    write_rows,
)

__all__ = [
    "estimate_text",
    "glue",
    "model_name",
    "number_text",
    "prepare",
    "read_records",
    "record",
    "show_plan",
    "show_table",
    "show_text",
    "table_html",
]

RECORDS_KEY = "records"
"""Name under which `record` glues a chapter's records; the build collects them by it."""

_GLUE_PREFIX = "application/papermill.record/"
_GLUED = re.compile(r"\{glue:text\}`([^`:]+)(?::([^`]*))?`")
_values: dict[str, str | int | float] = {}
_incomplete: list[str] = []
_NUMBERS = ("estimate", "ci_low", "ci_high")
_COLAB_PACKAGES = {"gguf": "gguf", "skdim": "scikit-dimension"}

SETUP_CELL = """\
# Setup: find the project, or clone it; on Colab, install what Colab lacks.
import subprocess
import sys
from pathlib import Path

REPOSITORY, REVISION = "{repository}", "{revision}"

clone = Path(REPOSITORY.rsplit("/", 1)[-1]).resolve()
folders = [Path.cwd(), *Path.cwd().parents, clone]
root = next((folder for folder in folders if (folder / "lib" / "notebook.py").is_file()), None)
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
    """Readies the session: sharp figures, and on Colab the packages that are missing there.

    Only small packages without which a chapter stops are installed, at the versions of
    requirements.txt and without their dependencies, so that Colab's own numpy and torch stay as
    they are.

    Raises:
        RuntimeError: if the installation fails.
    """
    if _in_notebook():
        set_matplotlib_formats("retina")
    if "google.colab" not in sys.modules:
        return
    missing = [name for module, name in _COLAB_PACKAGES.items() if find_spec(module) is None]
    if not missing:
        return
    pins = [
        line
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line.split("==")[0] in missing
    ]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *pins]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Could not install {', '.join(pins)}: {done.stderr.strip()}")


def model_name(default: str = "embedded") -> str:
    """Returns the model to run the chapter on: the environment variable MODEL, else `default`."""
    return os.environ.get("MODEL") or default


def glue(name: str, value: Any, format: str = "") -> None:  # noqa: A002
    """Makes a computed value available to the prose, as {glue:text}`name`.

    It needs IPython alone, so a chapter also runs where the book's tools are absent. Outside a
    notebook nothing happens.

    Args:
        name: key of the value, unique within the chapter.
        value: a number, string or bool; NumPy scalars are taken for what they hold.
        format: format specification applied now, such as ".2f". Without one the role may
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
    if format:
        value = f"{value:{format}}"
    _display({f"{_GLUE_PREFIX}text/plain": repr(value)}, _glue_metadata(name))
    _values[name] = value
    for text in [text for text in _incomplete if not _missing(text)]:
        show_text(text)


def show_text(text: str) -> None:
    """Displays Markdown with glued values filled in.

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


def estimate_text(
    estimate: float,
    low: float,
    high: float,
    n: int,
    unit: str = "",
    *,
    items: str = "prompts",
    decimals: int = 2,
) -> str:
    """Returns an estimate with its interval and n in words, as prose quotes it.

    Example:
        >>> estimate_text(0.62, 0.55, 0.68, 96)
        '0.62 [0.55, 0.68], n = 96 prompts'

    Args:
        estimate: the point estimate.
        low: lower bound of the interval.
        high: upper bound of the interval.
        n: number of independent items.
        unit: unit of the estimate, such as "nats"; empty for pure numbers.
        items: what was counted.
        decimals: digits after the point.

    Raises:
        ValueError: if a number is NaN or infinite, or the bounds are reversed.
    """
    if not all(math.isfinite(number) for number in (estimate, low, high)):
        raise ValueError(f"Expected finite numbers, got {estimate} [{low}, {high}].")
    if low > high:
        raise ValueError(f"The interval [{low}, {high}] is reversed: give low before high.")
    middle, lower, upper = (number_text(number, decimals) for number in (estimate, low, high))
    unit = f" {unit}" if unit else ""
    return f"{middle}{unit} [{lower}, {upper}], n = {n} {items}"


def number_text(value: float, decimals: int = 2) -> str:
    """Returns a number with a true minus sign; small ones with one significant digit."""
    tiny = value != 0 and abs(value) < 0.5 * 10**-decimals
    text = f"{value:.1g}" if tiny else f"{value:.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def record(records: pd.DataFrame) -> None:
    """Records a chapter's verdicts and shows them as a table. Called once, at the chapter's end.

    The records are glued into the page, from where the build collects them into
    `_build/results/results.json`, and written to `_build/results/<claim>.json`, where later
    chapters read them.

    Args:
        records: one row per statistic, with at least the columns `RECORD_COLUMNS`; all rows of
            one claim. Estimate and bounds may be missing where the verdict is `not testable`.

    Raises:
        ValueError: if a column is missing, a verdict is unknown, the claims are mixed, or a
            number is missing or infinite where a verdict was reached.
    """
    rows = to_rows(records)
    claim = rows[0]["claim"]
    write_rows(records_file(claim), rows)
    _display({f"{_GLUE_PREFIX}text/plain": to_json(rows)}, _glue_metadata(RECORDS_KEY))
    show_table(_verdict_table(rows), f"Verdicts on the claim “{claim.replace('-', ' ')}”")


def show_plan(plan: object | None) -> None:
    """Displays what a chapter's measurements are about to cost, a line; nothing without a plan.

    Args:
        plan: of `lib.engine.plan`, or None.
    """
    if plan is not None:
        _display({"text/plain": f"About to be measured: {plan}."})


def show_table(table: pd.DataFrame, caption: str) -> None:
    """Displays a table that scrolls sideways on a narrow screen and reads well aloud.

    Args:
        table: cells are shown as they are, numbers with two decimals; the index is left out.
        caption: says what the table shows; stands above it.
    """
    _display({"text/html": table_html(table, caption), "text/plain": table.to_string(index=False)})


def table_html(table: pd.DataFrame, caption: str) -> str:
    """Returns the HTML of `show_table`."""
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


def _verdict_table(rows: list[Record]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "statistic": row["statistic"].replace("_", " "),
            "task": row["task"],
            "estimate [95 % interval]": _interval(*(row[column] for column in _NUMBERS)),
            "verdict": row["verdict"],
            "n": row["n"],
            "model": f"{row['model']}, untrained" if row["untrained"] else row["model"],
            "part": row["part"],
            "criterion": row["criterion"],
        }
        for row in rows
    )


def _interval(estimate: float | None, low: float | None, high: float | None) -> str:
    text = "–" if estimate is None else _cell(estimate)
    bounds = "" if low is None and high is None else f" [{_cell(low) or '–'}, {_cell(high) or '–'}]"
    return (text + bounds).replace(" ", "\N{NO-BREAK SPACE}")


def _cell(value: Any) -> str:
    value = plain(value)
    if value is None:
        return ""
    return number_text(value) if isinstance(value, float) else str(value)


def _glue_metadata(name: str) -> dict[str, Any]:
    return {"scrapbook": {"name": name, "mime_prefix": _GLUE_PREFIX}}


def _in_notebook() -> bool:
    return bool(InteractiveShell.initialized())


def _display(
    data: dict[str, Any], metadata: dict[str, Any] | None = None, display_id: str | None = None
) -> None:
    if _in_notebook():
        display(data, raw=True, metadata=metadata or {}, display_id=display_id)
