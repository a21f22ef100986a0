"""Write the notebooks beside the chapters, in the Markdown that Colab and Jupyter show.

Neither knows MyST, so that roles and directives would stand there raw. Terms become links into
the glossary of the published book, citations links with author and year, margin notes quotations,
captions text under their figure. Text with computed values becomes a cell of `show_text`, which
displays it with the values filled in; a figure or table that is pasted, one of `show_glued`.
Whatever has no such form is refused, not passed on.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbformat import NotebookNode
from pybtex.database import BibliographyData, Person, parse_file

ROLE = re.compile(r"\{([a-z:+-]+)\}`([^`]+)`")
DIRECTIVE = re.compile(r"^(`{3,}|:{3,})\{([a-z:-]+)\} *([^\n]*)\n(.*?)^\1$", re.M | re.S)
OPTIONS = re.compile(r"\A(?::[\w-]+:[^\n]*\n)+")
ASIDES = ("margin", "admonition", "dropdown", "note", "tip", "seealso")
DEFINITION = re.compile(r"^(\S.*)\n: +", re.M)
PAGE_LINK = re.compile(r"\[([^]]*)\]\(([\w-]+)\.md(#[\w-]+)?\)")
UNKNOWN = re.compile(r"^(?:`{3,}|:{3,})\{.*|^\([\w-]+\)=$", re.M)  # a directive, a label

COMPUTED = "{glue:text}`"
FOLDED = {"hide-input", "hide-cell", "remove-cell"}
GLUED = re.compile(r"\{glued\}`([^`]+)`(?:\n(.*))?", re.S)  # a pasted output, with its caption
SHOWN_OUTPUT = '# What is computed further down.\nnotebook.show_glued("{name}")'
SHOWN_TEXT = '# Text with the values that were computed.\nnotebook.show_text(r"""\n{text}\n""")'


def notebook_text(chapter: Path, first_line: str) -> str:
    """Return the notebook of a chapter, as it stands in the file beside it.

    Args:
        chapter: the chapter's file, in MyST, in a folder beside _config.yml.
        first_line: how the setup cell begins; text with computed values that comes before it in
            the chapter follows it in the notebook.

    Raises:
        ValueError: if the chapter uses a role or directive that has no form in plain Markdown.
    """
    source = jupytext.read(chapter)
    cells: list[NotebookNode] = []
    waiting: list[NotebookNode] | None = []
    for cell in source.cells:
        if cell.cell_type == "code":
            is_setup = cell.source.startswith(first_line)
            folded = not is_setup and bool(FOLDED & set(cell.metadata.get("tags", [])))
            cells.append(_code_cell(cell.source, folded=folded))
            if is_setup and waiting is not None:
                cells += waiting
                waiting = None
            cells += _caption_cells(cell, chapter)
            continue
        for new in _text_cells(_plain(cell.source, chapter)):
            early = waiting is not None and new.cell_type == "code"
            (waiting if waiting is not None and early else cells).append(new)
    _number(cells)
    metadata = {"kernelspec": dict(source.metadata["kernelspec"])}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def plain_markdown(
    text: str,
    *,
    site: str,
    bibliography: BibliographyData,
    title_of: Callable[[str], str],
) -> str:
    """Return MyST as plain Markdown; roles that hold computed values are left for `show_text`.

    Args:
        text: Markdown of a chapter, without code cells.
        site: address of the published book.
        bibliography: entries that citations name.
        title_of: title of a chapter, by the name of its file without suffix.

    Raises:
        ValueError: if a role or directive has no form in plain Markdown.
    """

    def directive(match: re.Match[str]) -> str:
        name, title, body = match[2], match[3].strip(), OPTIONS.sub("", match[4]).strip()
        if name in ("glue", "glue:figure"):
            caption = "\n**Figure.** " + re.sub(r"\n\s*\n", "\n", body) if body else ""
            return f"{{glued}}`{title}`{caption}"
        if name not in ASIDES:
            raise ValueError(f"The directive {{{name}}} has no form in a notebook.")
        lines = [*([f"**{title}**", ""] if title else []), *body.splitlines()]
        return "\n".join(f"> {line}".rstrip() for line in lines)

    def role(match: re.Match[str]) -> str:
        name, content = match[1], match[2]
        if name in ("glue:text", "glued"):
            return match[0]
        if name == "term":
            return _term(content, site)
        if name in ("cite", "cite:p"):
            found = [_citation(key.strip(), bibliography, ", ") for key in content.split(",")]
            return f"({'; '.join(found)})"
        if name == "cite:t":
            return _citation(content, bibliography, " ", parentheses=True)
        raise ValueError(f"The role {{{name}}} has no form in a notebook.")

    def link(match: re.Match[str]) -> str:
        words = match[1] or title_of(match[2])
        return f"[{words}]({site}/book/{match[2]}.html{match[3] or ''})"

    text = DIRECTIVE.sub(directive, text)
    text = ROLE.sub(role, text)
    text = PAGE_LINK.sub(link, text)
    text = DEFINITION.sub(r"**\1.** ", text)
    left = UNKNOWN.search(text)
    if left:
        raise ValueError(f"{left[0]!r} has no form in a notebook.")
    return text


def site_address(repository: str) -> str:
    """Return where GitHub Pages publishes the book of a repository."""
    owner, name = repository.rstrip("/").split("/")[-2:]
    return f"https://{owner}.github.io/{name}"


def _plain(text: str, chapter: Path) -> str:
    root = chapter.parent.parent
    repository = yaml.safe_load((root / "_config.yml").read_text("utf-8"))["repository"]
    try:
        return plain_markdown(
            text,
            site=site_address(repository["url"]),
            bibliography=_bibliography(root / "book" / "references.bib"),
            title_of=lambda name: _title(chapter.with_name(f"{name}.md")),
        )
    except ValueError as problem:
        raise ValueError(f"{chapter.name}: {problem}") from None


@cache
def _bibliography(file: Path) -> BibliographyData:
    return parse_file(str(file))


def _title(chapter: Path) -> str:
    heading = re.search(r"^# (.+)$", chapter.read_text("utf-8"), re.M)
    if heading is None:
        raise ValueError(f"{chapter.name} has no title.")
    return heading[1]


def _term(content: str, site: str) -> str:
    shown = re.fullmatch(r"(.+?) <(.+)>", content)
    words, term = (shown[1], shown[2]) if shown else (content, content)
    return f"[{words}]({site}/book/glossary.html#{term_anchor(term)})"


def term_anchor(term: str) -> str:
    """Return the anchor that Sphinx gives a term of the glossary."""
    plain = unicodedata.normalize("NFKD", term).encode("ascii", "ignore").decode()
    return "term-" + re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")


def _citation(
    key: str, bibliography: BibliographyData, between: str, *, parentheses: bool = False
) -> str:
    entry = bibliography.entries[key]
    year = entry.fields["year"]
    words = _authors(entry.persons["author"]) + between + (f"({year})" if parentheses else year)
    return f"[{words}]({entry.fields['url']})" if "url" in entry.fields else words


def _authors(people: list[Person]) -> str:
    names = [" ".join([*one.prelast_names, *one.last_names]).strip("{}") for one in people]
    if len(names) == 2 and names[1] != "others":
        return " and ".join(names)
    return names[0] if len(names) == 1 else f"{names[0]} et al."


def _text_cells(text: str) -> list[NotebookNode]:
    """Return Markdown cells, and code cells for what is computed: outputs, text with values."""
    cells: list[NotebookNode] = []
    kept: list[str] = []
    for paragraph in re.split(r"\n{2,}", text.strip()):
        output = GLUED.fullmatch(paragraph)
        if output is None and COMPUTED not in paragraph:
            kept.append(paragraph)
            continue
        if kept:
            cells.append(nbformat.v4.new_markdown_cell("\n\n".join(kept)))
            kept = []
        shown = [SHOWN_OUTPUT.format(name=output[1])] if output else []
        if output is None or output[2]:
            shown.append(SHOWN_TEXT.format(text=output[2] if output else paragraph))
        cells.append(_code_cell("\n".join(shown), folded=True))
    if kept:
        cells.append(nbformat.v4.new_markdown_cell("\n\n".join(kept)))
    return cells


def _caption_cells(cell: NotebookNode, chapter: Path) -> list[NotebookNode]:
    figure = cell.metadata.get("mystnb", {}).get("figure")
    if figure is None:
        return []
    name = figure["name"].removeprefix("fig-").replace("-", " ")
    return _text_cells(f"**Figure “{name}”.** " + _plain(figure["caption"], chapter))


def _code_cell(source: str, *, folded: bool) -> NotebookNode:
    hidden = {"cellView": "form", "jupyter": {"source_hidden": True}}  # on Colab; in JupyterLab
    return nbformat.v4.new_code_cell(source, metadata=hidden if folded else {})


def _number(cells: list[NotebookNode]) -> None:
    """Give each cell an id that depends on its text alone, so that others keep theirs."""
    seen: dict[str, int] = {}
    for cell in cells:
        digest = sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
