"""Carries the repository's address from _config.yml into all files that name it.

Run by `make notebooks`. The setup cell of each chapter is written anew from `lib.reading.notebook`,
and the chapter's notebook from the chapter; in the other files the address they name so far is
replaced.
"""

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.reading.notebook import SETUP_CELL  # noqa: E402
from notebooks import notebook_text  # noqa: E402

FILES_WITH_ADDRESS = ("README.md", "CITATION.cff", "book/intro.md")
FIRST_LINE = SETUP_CELL.split(",")[0]  # as it begins in older versions of the cell, too
PLACEHOLDER = re.compile(r"(?<=\n)SETUP\n(?=```)")


def setup_cell(root: Path = ROOT) -> str:
    """Returns the setup cell with this repository's address and branch filled in."""
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    cell = SETUP_CELL.replace("{repository}", repository["url"])
    return cell.replace("{revision}", repository["branch"])


def with_setup_cell(chapter: str, cell: str) -> str:
    """Returns a chapter's text with its setup cell replaced by `cell`.

    The setup cell is the code cell whose code begins with the first line of `SETUP_CELL`, or, in
    a new chapter, is the word SETUP alone.

    Raises:
        ValueError: if the chapter has no such cell.
    """
    chapter = PLACEHOLDER.sub(FIRST_LINE + "\n", chapter)
    start = chapter.find(FIRST_LINE)
    if start < 0:
        raise ValueError("No setup cell. Begin with a code cell that holds the word SETUP alone.")
    end = chapter.index("```", start)
    return chapter[:start] + cell + chapter[end:]


def with_address(text: str, old: str, new: str) -> str:
    """Returns text with the owner and name of a repository replaced, in links of every kind."""
    return text.replace(_slug(old), _slug(new))


def _slug(url: str) -> str:
    return "/".join(url.rstrip("/").split("/")[-2:])


def chapters(root: Path = ROOT) -> list[Path]:
    """Returns the chapters that are notebooks: those with a header of jupytext."""
    pages = sorted((root / "book").glob("*.md"))
    return [page for page in pages if re.search(r"^jupytext:", page.read_text("utf-8"), re.M)]


def main() -> None:
    """Rewrites the files that are not up to date."""
    old = re.search(r"^repository-code: *\"?([^\s\"]+)", (ROOT / "CITATION.cff").read_text(), re.M)
    new = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    for name in FILES_WITH_ADDRESS:
        file = ROOT / name
        if file.is_file() and old:
            _rewrite(file, with_address(file.read_text(encoding="utf-8"), old[1], new))
    cell = setup_cell()
    for file in chapters():
        try:
            _rewrite(file, with_setup_cell(file.read_text(encoding="utf-8"), cell))
            _rewrite(file.with_suffix(".ipynb"), notebook_text(file, FIRST_LINE))
        except ValueError as problem:
            sys.exit(f"{file.relative_to(ROOT)}: {problem}")


def _rewrite(file: Path, text: str) -> None:
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
        print(f"rewrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
