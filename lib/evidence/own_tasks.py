"""A reader's own tasks: two CSV files beside the book's, checked before any model is read.

TASKS in the environment names subjects and answers (columns task, subject, answer, and group where
the wordings have one), TEMPLATES the wordings (task, text; `my-tasks-templates.csv` beside
`my-tasks.csv` by default). They are gated and held against the criteria as the book's tasks are;
their names then begin with "own: ", and no pooled number counts them.
"""

import os
import sys
from pathlib import Path

import pandas as pd

from lib.engine.files import DATA, ROOT
from lib.evidence.tasks import ITEM_COLUMNS, Tables, check_template, read_csv
from lib.science.estimate import OWN


def own_tasks(tasks: str | Path = "", templates: str | Path = "") -> Tables | None:
    """Return a reader's own tasks for `load_tasks`, None where no file is named.

    Args:
        tasks: subjects and answers, named from the current folder or the project's on; by default
            what TASKS names, in the project's folder.
        templates: wordings; by default what TEMPLATES names, or the file beside `tasks`.

    Raises:
        ValueError: what is wrong with a file, and what to do, in one line.
    """
    files = _files(tasks, templates)
    if not files:
        return None
    items, texts = _read(files[0], "task", "subject", "answer"), _read(files[1], "task", "text")
    items = items.assign(group=items.get("group", ""))[list(ITEM_COLUMNS)]
    items = items.apply(lambda column: column.str.strip())
    book = set(read_csv(DATA / "tasks.csv", ITEM_COLUMNS)["task"])
    for name in dict.fromkeys([*items["task"], *texts["task"]]):
        own, wordings = items[items["task"] == name], texts.loc[texts["task"] == name, "text"]
        answers = own.groupby(["subject", "group"])["answer"].nunique()
        problem = ""
        if name in book:
            problem = "the book has a task of this name. Rename it."
        elif own.empty or wordings.empty:
            problem = f"it is in one of {' and '.join(file.name for file in files)}. Add it there."
        elif own["subject"].nunique() < 2:
            problem = "it has one subject, so nothing can be exchanged. Give 10 or more."
        elif wordings.nunique() < 2:
            problem = "it has one wording, and vectors are fitted on the others. Give two or three."
        elif (answers > 1).any():
            problem = f"subject {answers.idxmax()[0]!r} has several answers. Keep one."
        if problem:
            raise ValueError(f"{files[0].name}, task {name!r}: {problem}")
        for text in wordings:
            check_template(name, text, own)
    return items.assign(task=OWN + items["task"]), texts.assign(task=OWN + texts["task"])


def contents() -> bytes:
    """Return what the files hold that the environment names, for the keys of the build."""
    return b"\n".join(file.read_bytes() for file in _files("", "") if file.is_file())


def _files(tasks: str | Path, templates: str | Path) -> list[Path]:
    if not tasks and os.environ.get("TASKS"):
        tasks, named = ROOT / os.environ["TASKS"], os.environ.get("TEMPLATES")
        templates = templates or (ROOT / named if named else "")
    first = _find(tasks)
    beside = first.with_name(f"{first.stem}-templates.csv") if tasks else first
    return [first, _find(templates or beside)] if tasks else []


def _find(file: str | Path) -> Path:
    """Return a file that is named from the current folder on, else from the project's."""
    return Path(file) if Path(file).is_file() else ROOT / file


def _read(file: Path, *columns: str) -> pd.DataFrame:
    try:
        table = read_csv(file, columns)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file.name} is no CSV in UTF-8. Save it as one. ({reason})") from None
    if table.empty or (table[list(columns)].map(str.strip) == "").any(axis=None):
        raise ValueError(f"{file.name} has no rows or an empty cell; fill in {', '.join(columns)}.")
    return table.assign(task=table["task"].str.strip())


if __name__ == "__main__":
    try:
        own_tasks()
    except ValueError as problem:
        sys.exit(f"error: {problem}")
