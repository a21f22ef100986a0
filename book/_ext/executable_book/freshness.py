"""Which chapters are executed, in which order, and from which cache.

The execution cache knows a chapter by its code cells alone. Here each chapter gets a cache folder
named after a digest of all else that its results depend on: the modules that its cells import, and
what these import, the data that they name, the environment, the model, a reader's own tasks, and
the transitions that an earlier chapter hands on. A failed or warning build is made to look at every
page again next time, so that no second run passes in silence.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jupytext
from sphinx.application import ENV_PICKLE_FILENAME, Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

from executable_book.results import failed_pages
from lib.engine.files import DATA, ROOT
from lib.engine.sources import digest_of_files, imported_files
from lib.evidence import own_tasks, transition
from lib.evidence.records import (
    EXPLORATIONS,
    claim_file,
    pages,
    read_records,
    to_json,
)

CACHE = Path("_build", ".jupyter_cache")
KEPT_CACHES = 24
ENVIRONMENT_FILES = ("requirements.txt", "environment.yml")
PAGE_FILES = {
    "book/benchmarks": (
        "benchmarks/results.json",
        "benchmarks/chapters.json",
        "benchmarks/chapters.py",
        "benchmarks/tables.py",
        "benchmarks/figures.py",
    )
}
"""What single pages show besides."""
SHOWING = ("models", "first-registration", "how-computed")
"""Pages without code that show what the build finds: read again in every build."""


def chapter_digest(page: str) -> str:
    """Return a digest of what a chapter's execution depends on beside its own cells.

    Raises:
        ValueError: cells that are no Python, or that import what lib does not have.
    """
    code = code_of(ROOT / f"{page}.md")
    try:
        modules = imported_files(code)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
    files = [*modules, *named_data(code, modules)]
    files += [ROOT / name for name in (*ENVIRONMENT_FILES, *PAGE_FILES.get(page, ()))]
    if ROOT / "lib" / "reading" / "explorer.py" in modules:
        files += (ROOT / "tests" / "recorded").glob(f"*.{EXPLORATIONS}")
    digest = hashlib.sha256(digest_of_files(file for file in files if file.is_file()).encode())
    model = os.environ.get("MODEL") or "embedded"
    digest.update(f"{platform.python_version()} {version('torch')} {model}".encode())
    for path in sorted((ROOT / model).glob("*")):  # a folder's; other models keep their names
        found = path.stat()
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}".encode())
    if Path(own_tasks.__file__) in modules:
        digest.update(own_tasks.contents())
    if Path(transition.__file__) in modules:
        digest.update(handed_on().encode())
    return digest.hexdigest()[:16]


def code_of(chapter: Path) -> str:
    """Return the code cells of a chapter as one text; "" for a page without any."""
    if not chapter.read_text(encoding="utf-8").startswith("---\njupytext:"):
        return ""
    return _code(chapter, chapter.stat().st_mtime_ns)


@cache
def _code(chapter: Path, _time: int) -> str:
    cells = jupytext.read(chapter).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def named_data(code: str, modules: Iterable[Path]) -> list[Path]:
    """Return the files of lib/data whose names stand in some code or modules."""
    texts = [code, *(module.read_text(encoding="utf-8") for module in modules)]
    files = sorted(path for path in DATA.rglob("*") if path.is_file())
    return [path for path in files if any(path.name in text for text in texts)]


def handed_on() -> str:
    """Return the transitions as the phase-transition chapter recorded them, as text."""
    rows = read_records(claim_file(transition.CLAIM))
    return to_json([row for row in rows if row["statistic"] == transition.STATISTIC])


def find_outdated(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """Return the pages to read again: those whose digest changed, and those that show results."""
    known = getattr(env, "executable_book_digests", {})
    first, *chapters = pages(Path(app.srcdir))
    return [
        first,
        *(page for page in chapters if page in known and known[page] != chapter_digest(page)),
        *(page for page in chapters if Path(page).name in SHOWING and page in env.found_docs),
    ]


def order_pages(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Put the pages to be read into the book's order, the landing page last.

    Pages after the first chapter to be read are read too, since they may quote its records; their
    execution is taken from the cache when the records are as before.
    """
    first, *chapters = pages(Path(app.srcdir))
    outdated = [place for place, page in enumerate(chapters) if page in docnames]
    following = chapters[outdated[0] :] if outdated else []
    others = [page for page in docnames if page not in following and page != first]
    docnames[:] = [page for page in [*others, *following, first] if page in env.found_docs]


def choose_cache(app: Sphinx, docname: str, source: list[str]) -> None:
    """Point the execution of a page to the cache folder that its digest names.

    What it and later chapters recorded in an earlier build is put away, so that a chapter sees
    the records of the chapters before it and no others.
    """
    env = app.env
    chapters = pages(Path(app.srcdir))[1:]
    if docname not in chapters:
        return
    for page in chapters[chapters.index(docname) :]:
        claim_file(Path(page).name).unlink(missing_ok=True)
    digest = chapter_digest(docname)
    digests = {**getattr(env, "executable_book_digests", {}), docname: digest}
    env.executable_book_digests = digests  # type: ignore[attr-defined]
    folder = Path(app.srcdir) / CACHE / digest
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    env.mystnb_config = env.mystnb_config.copy(execution_cache_path=str(folder))  # type: ignore[attr-defined]


def finish(app: Sphinx, exception: Exception | None) -> None:
    """End the build with an error if a chapter failed, and forget it if anything went wrong.

    Raises:
        ExtensionError: if the execution of a chapter failed.
    """
    _remove_old_caches(Path(app.srcdir) / CACHE)
    failed = failed_pages(app.env) if app.env is not None else []
    if exception is not None or app._warncount or failed:
        (Path(app.doctreedir) / ENV_PICKLE_FILENAME).unlink(missing_ok=True)
    if failed and exception is None:
        raise ExtensionError(f"The execution of {', '.join(failed)} failed; see above.")


def _remove_old_caches(folder: Path) -> None:
    kept = sorted(folder.glob("*"), key=lambda one: one.stat().st_mtime)
    for one in kept[:-KEPT_CACHES]:
        shutil.rmtree(one, ignore_errors=True)


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.connect("env-get-outdated", find_outdated)
    app.connect("env-before-read-docs", order_pages)
    app.connect("source-read", choose_cache)
    app.connect("build-finished", finish, priority=900)  # after the results are written
