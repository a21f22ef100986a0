"""Progress of long loops: a bar for a person, a line in a file for the build of the book."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

PROGRESS_FILE = "PROGRESS_FILE"
"""Environment variable: the file that `track` appends to while the book is built."""

PROGRESS_CHAPTER = "PROGRESS_CHAPTER"
"""Environment variable: the chapter that is being executed, named in each line."""

_SECONDS_BETWEEN_LINES = 0.5

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items one by one and shows how far the loop has come.

    In a live notebook and at a terminal a bar is drawn. In the build of the book, which names a
    file in the environment variable `PROGRESS_FILE`, a line of JSON is appended to that file now
    and then (`chapter`, `what`, `done`, `total`, `seconds`) and nothing is written to the
    notebook, so that no trace stays in the pages. Elsewhere, in tests and in logs, it is silent.

    Args:
        items: what is looped over; consumed lazily.
        description: what is going on, in a few words, such as "months-sequence: exchange".
        total: number of items, where `items` has no length.

    Yields:
        The items, unchanged and in order.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    file = os.environ.get(PROGRESS_FILE)
    if file:
        yield from _track_in_file(items, description, total, file)
    else:
        silent = not (_in_live_notebook() or sys.stderr.isatty())
        yield from tqdm(items, desc=description, total=total, disable=silent, leave=False)


def _track_in_file(
    items: Iterable[Item], description: str, total: int | None, file: str
) -> Iterator[Item]:
    start = time.monotonic()
    last = -float("inf")
    done = 0

    def write_line() -> None:
        line = json.dumps(
            {
                "chapter": os.environ.get(PROGRESS_CHAPTER, ""),
                "what": description,
                "done": done,
                "total": total,
                "seconds": round(time.monotonic() - start, 1),
            }
        )
        try:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(line + "\n")
        except OSError:
            return  # a full disk or a removed file must not end a measurement

    write_line()
    for item in items:
        yield item
        done += 1
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES and done != total:
            last = time.monotonic()
            write_line()
    write_line()


def _in_live_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
