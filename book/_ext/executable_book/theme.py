"""Mends on the pages what the theme and the extensions that it brings get wrong."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


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


def setup(app: Sphinx) -> None:
    """Connects this part to the build."""
    app.connect("builder-inited", silence_thebe, priority=1)
    app.connect("html-page-context", mend_body)
