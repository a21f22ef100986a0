"""Shows how far the chapters' loops have come, at the terminal and never in the pages."""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from sphinx.application import Sphinx

from lib.engine.progress import PROGRESS_CHAPTER, PROGRESS_FILE

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_LINES = 15.0


class Display:
    """Writes progress to a stream: one line rewritten at a terminal, sparse lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        """Prepares to write to `stream`."""
        self.stream = stream
        self.at_terminal = stream.isatty()
        self.last_what = ""
        self.last_time = -float("inf")

    def show(self, progress: dict[str, Any]) -> None:
        """Shows one line of the progress file, unless a similar one was shown just before."""
        text = describe(progress)
        if self.at_terminal:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{text[:width]}")
        else:
            what = f"{progress['chapter']} {progress['what']}"
            now = time.monotonic()
            finished = progress["done"] == progress["total"]
            if (
                what == self.last_what
                and not finished
                and now - self.last_time < SECONDS_BETWEEN_LINES
            ):
                return
            self.last_what, self.last_time = what, now
            self.stream.write(text + "\n")
        self.stream.flush()

    def end(self) -> None:
        """Leaves the terminal's line empty."""
        if self.at_terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def describe(progress: dict[str, Any]) -> str:
    """Returns a line such as "phase-transition: sweep of months-sequence 12/30 (40 %), 3 s"."""
    done, total = progress["done"], progress["total"]
    extent = f"{done}/{total} ({100 * done // total} %)" if total else f"{done}"
    return f"{progress['chapter']}: {progress['what']} {extent}, {progress['seconds']:.0f} s"


class Follower:
    """Follows the progress file in a thread of its own and shows what is appended."""

    def __init__(self, file: Path, display: Display) -> None:
        """Prepares to follow `file`."""
        self.file = file
        self.display = display
        self.place = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Starts following, from an empty file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(b"")
        self.thread.start()

    def stop(self) -> None:
        """Shows what is left and ends the thread."""
        self.stopped.set()
        self.thread.join()

    def look(self) -> None:
        """Shows the whole lines that came since the last look."""
        with self.file.open("rb") as lines:
            lines.seek(self.place)
            new = lines.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.place += len(whole)
        for line in whole.splitlines():
            self.display.show(json.loads(line))

    def _run(self) -> None:
        while not self.stopped.wait(SECONDS_BETWEEN_LOOKS):
            self.look()
        self.look()
        self.display.end()


def start(app: Sphinx) -> None:
    """Names the progress file to the chapters' kernels and follows it until the build ends."""
    file = (Path(app.outdir).parent / "progress.jsonl").resolve()
    follower = Follower(file, Display(sys.__stderr__ or sys.stderr))
    os.environ[PROGRESS_FILE] = str(file)

    def stop(app: Sphinx, exception: Exception | None) -> None:
        follower.stop()

    app.connect("build-finished", stop, priority=100)
    follower.start()


def name_chapter(app: Sphinx, docname: str, source: list[str]) -> None:
    """Names the chapter to its kernel, before it is executed."""
    os.environ[PROGRESS_CHAPTER] = Path(docname).name


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.connect("builder-inited", start)
    app.connect("source-read", name_chapter)
