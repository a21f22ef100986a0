"""What several directives show alike: tables, pictures with a caption, addresses of chapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from lib.evidence.records import pages

PICTURES = Path("_build", "pictures")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> nodes.Node:
    """Return a table that scrolls sideways on a narrow screen; `name` is its class."""

    def row_node(cells: Sequence[str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", cell)) for cell in cells))

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", row_node(head))
    group += nodes.tbody("", *map(row_node, rows))
    made = nodes.table("", group, classes=[name])
    return nodes.container("", made, classes=["table-scroll"])


class Picture(SphinxDirective):
    """A directive that shows a picture, with alternative text; its content is the caption."""

    has_content = True
    option_spec: ClassVar = {"alt": directives.unchanged_required}

    def place(self, name: str) -> Path:
        """Return where a picture of the build is to be put."""
        picture = Path(self.env.srcdir, PICTURES, name)
        picture.parent.mkdir(parents=True, exist_ok=True)
        return picture

    def figure(self, picture: Path) -> nodes.figure:
        """Return the figure that shows a picture."""
        uri = f"/{picture.relative_to(self.env.srcdir).as_posix()}"
        figure = nodes.figure("", nodes.image("", uri=uri, alt=self.options.get("alt", "")))
        figure += nodes.caption("", "", *self.parse_inline("\n".join(self.content))[0])
        return figure


def chapter_addresses(env: BuildEnvironment) -> dict[str, str]:
    """Return the address of each page but the first, seen from the page being read, by its name."""
    return {
        Path(page).name: env.app.builder.get_relative_uri(env.docname, page)
        for page in pages(Path(env.srcdir))[1:]
    }
