"""A chapter's glued figure on another page, with alternative text and a caption of its own."""

import base64
import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

from executable_book.displays import Picture
from lib.evidence.records import pages


class ChapterFigure(Picture):
    """Show a figure that a chapter glued; nothing where the chapter is not in the book.

    Arguments are the chapter and the figure's name, the content is the caption::

        ```{chapter-figure} phase-transition main
        :alt: Two curves that cross.

        What it shows.
        ```
    """

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Return the figure."""
        chapter, name = self.arguments
        page = next((p for p in pages(Path(self.env.srcdir)) if Path(p).name == chapter), None)
        folder = Path(self.env.mystnb_config.output_folder)  # type: ignore[attr-defined]
        glued = folder / f"{page}.glue.json"
        data = json.loads(glued.read_text(encoding="utf-8")) if page and glued.is_file() else {}
        if name not in data:
            return []
        picture = self.place(f"{chapter}-{name}.png")
        picture.write_bytes(base64.b64decode(data[name]["data"]["image/png"]))
        return [self.figure(picture)]


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.add_directive("chapter-figure", ChapterFigure)
