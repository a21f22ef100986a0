"""Mends on the pages what the theme and the extensions that it brings get wrong."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

FOREST = "All records of the chapter: a row for each task, its interval beside the threshold."


def silence_thebe(app: Sphinx) -> None:
    """Takes out the extension for live code.

    Unused here, it is set up twice, which is an error on every page, and names servers outside.
    """
    for listeners in app.events.listeners.values():
        listeners[:] = [one for one in listeners if "thebe" not in one.handler.__module__]


def mend_body(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Takes the role of a list from the bibliography, whose entries have none of list items."""
    if "body" in context:
        context["body"] = context["body"].replace(
            '<div role="list" class="citation-list">', '<div class="citation-list">'
        )


def name_pictures(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Gives pictures that were pasted or displayed without alternative text one: their caption's.

    A picture without a caption is the forest of a chapter's records.
    """
    for image in doctree.findall(nodes.image):
        if image.get("alt"):
            continue
        figure = image.parent
        while figure is not None and not isinstance(figure, nodes.figure):
            figure = figure.parent
        caption = None if figure is None else figure.next_node(nodes.caption)
        image["alt"] = FOREST if caption is None else " ".join(caption.astext().split())[:300]


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.connect("builder-inited", silence_thebe, priority=1)
    app.connect("html-page-context", mend_body)
    app.connect("doctree-resolved", name_pictures)  # once pasted pictures are in place
