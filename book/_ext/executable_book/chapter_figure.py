"""A chapter's glued figure on another page, with alternative text and a caption of its own."""

import base64
import json
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lib.evidence.records import pages

PICTURES = Path("_build", "pictures")


class ChapterFigure(SphinxDirective):
    """Show a figure that a chapter glued; nothing where the chapter is not in the book.

    Arguments are the chapter and the figure's name, the content is the caption::

        ```{chapter-figure} phase-transition main
        :alt: Two curves that cross.

        What it shows.
        ```
    """

    required_arguments = 2
    has_content = True
    option_spec: ClassVar = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Return the figure."""
        chapter, name = self.arguments
        root = Path(self.env.srcdir)
        page = next((one for one in pages(root) if Path(one).name == chapter), None)
        folder = Path(self.env.mystnb_config.output_folder)  # type: ignore[attr-defined]
        glued = folder / f"{page}.glue.json"
        data = json.loads(glued.read_text(encoding="utf-8")) if page and glued.is_file() else {}
        if name not in data:
            return []
        picture = root / PICTURES / f"{chapter}-{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(base64.b64decode(data[name]["data"]["image/png"]))
        uri = f"/{picture.relative_to(root).as_posix()}"
        figure = nodes.figure("", nodes.image("", uri=uri, alt=self.options.get("alt", "")))
        figure += nodes.caption("", "", *self.parse_inline("\n".join(self.content))[0])
        return [figure]


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.add_directive("chapter-figure", ChapterFigure)
