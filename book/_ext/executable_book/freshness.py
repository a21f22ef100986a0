"""Which chapters are executed, in which order, and from which cache.

The execution cache knows a chapter by its code cells alone. Here each chapter gets a cache folder
named after a digest of everything else that its results depend on. A failed or warning build is
made to look at every page again next time, so that no second run passes in silence.
"""

import hashlib
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from sphinx.application import ENV_PICKLE_FILENAME, Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

from executable_book.results import failed_pages
from lib.evidence.results import pages, records_file

CACHE = Path("_build", ".jupyter_cache")
KEPT_CACHES = 24
FACTS_PAGE = "book/how-computed"
ENVIRONMENT_FILES = ("requirements.txt", "environment.yml")
PAGE_FILES = {
    "book/benchmarks": (
        "benchmarks/results.json",
        "benchmarks/tables.py",
        "benchmarks/figures.py",
    )
}
"""What single pages show besides: read again in every build, executed again when it changes."""


def common_digest(root: Path) -> str:
    """Returns a digest of what all chapters depend on.

    That is: every file of lib/, data included, the files that pin the environment, the versions
    of Python and torch in use, and the model that is asked for.
    """
    digest = hashlib.sha256()
    files = [path for path in (root / "lib").rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    for path in [*sorted(files), *(root / name for name in ENVIRONMENT_FILES)]:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    model = os.environ.get("MODEL") or "embedded"
    digest.update(f"{platform.python_version()} {version('torch')} {model}".encode())
    return digest.hexdigest()


def chapter_digest(common: str, shown: list[Path]) -> str:
    """Returns a digest of what one chapter depends on: the common part and some files.

    These are the records of earlier chapters and what the page shows besides.
    """
    digest = hashlib.sha256(common.encode())
    for file in shown:
        digest.update(file.read_bytes() if file.is_file() else b"-")
    return digest.hexdigest()[:16]


def find_outdated(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """Returns the pages to read again: all if what they share changed.

    Always the landing page, the pages that show files of their own, and the one that says how the
    book was computed.
    """
    common = common_digest(Path(app.srcdir))
    every = pages(Path(app.srcdir))
    if getattr(env, "executable_book_digest", common) != common:
        return every
    shown = [page for page in every if page in PAGE_FILES or Path(page).name == "models"]
    return [every[0], *shown, *({FACTS_PAGE} & env.found_docs)]


def order_pages(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Puts the pages to be read into the book's order, the landing page last.

    Pages after the first chapter to be read are read too, since they may quote its records; their
    execution is taken from the cache when the records are as before.
    """
    first, *chapters = pages(Path(app.srcdir))
    outdated = [place for place, page in enumerate(chapters) if page in docnames]
    following = chapters[outdated[0] :] if outdated else []
    others = [page for page in docnames if page not in following and page != first]
    docnames[:] = [page for page in [*others, *following, first] if page in env.found_docs]
    env.executable_book_digest = common_digest(Path(app.srcdir))  # type: ignore[attr-defined]


def choose_cache(app: Sphinx, docname: str, source: list[str]) -> None:
    """Points the execution of a page to the cache folder that its digest names.

    What it and later chapters recorded in an earlier build is put away, so that a chapter sees
    the records of the chapters before it and no others.
    """
    env = app.env
    chapters = pages(Path(app.srcdir))[1:]
    if docname not in chapters:
        return
    place = chapters.index(docname)
    for page in chapters[place:]:
        records_file(Path(page).name).unlink(missing_ok=True)
    digest = chapter_digest(
        env.executable_book_digest,  # type: ignore[attr-defined]
        [
            *(records_file(Path(page).name) for page in chapters[:place]),
            *(Path(app.srcdir) / name for name in PAGE_FILES.get(docname, ())),
        ],
    )
    folder = Path(app.srcdir) / CACHE / digest
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    env.mystnb_config = env.mystnb_config.copy(execution_cache_path=str(folder))  # type: ignore[attr-defined]


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Ends the build with an error if a chapter failed, and forgets it if anything went wrong.

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
    caches = (
        sorted(folder.iterdir(), key=lambda cache: cache.stat().st_mtime) if folder.is_dir() else []
    )
    for cache in caches[:-KEPT_CACHES]:
        shutil.rmtree(cache, ignore_errors=True)


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.connect("env-get-outdated", find_outdated)
    app.connect("env-before-read-docs", order_pages)
    app.connect("source-read", choose_cache)
    app.connect("build-finished", finish, priority=900)  # after the results are written
