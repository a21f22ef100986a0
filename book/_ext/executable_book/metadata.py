"""What other programs read of a page: title, summary and picture for previews, and how to cite.

Also the page that a server shows where there is none. Everything has an absolute address, since
previews and that page are read elsewhere; nothing of it is loaded when a page is read.
"""

import re
from html import escape
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx

from lib.engine.files import write_atomically
from notebooks import site_address

PICTURE = "_static/main-result.png"
LONGEST = 200
"""Characters of a summary, about as many as previews show."""
LEAD = re.compile(r"^(The claim|The answer)\. ")
NOT_FOUND = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>Page not found – {title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1.1rem/1.5 system-ui, sans-serif; margin: 15vh auto; max-width: 34rem }}
main {{ padding: 0 1rem }}
</style>
</head>
<body>
<main>
<h1>There is no page here</h1>
<p>It may have moved, or the address has a slip. <a href="{site}/">{title}</a> begins on its first
page, and its <a href="{site}/search.html">search</a> finds the rest.</p>
</main>
</body>
</html>
"""


def head_tags(title: str, summary: str, *, book: str, site: str, page: str, citation: Any) -> str:
    """Return the tags for a page's head: Open Graph, and those by which the book is cited.

    Args:
        title: the page's title.
        summary: what it says, in plain text; longer ones are cut at a word.
        book: the book's title.
        site: the address of the published book.
        page: the page's name.
        citation: what CITATION.cff says, with `authors`, and `year`.
    """
    summary = shortened(summary)
    tags = [("name", "description", summary)] + [
        ("property", f"og:{name}", value)
        for name, value in (
            ("type", "article"),
            ("title", title),
            ("description", summary),
            ("site_name", book),
            ("url", f"{site}/{page}.html"),
            ("image", f"{site}/{PICTURE}"),
            ("image:alt", "The book's main result: transfer of a prediction against depth"),
        )
    ]
    tags += [("name", "twitter:card", "summary_large_image"), ("name", "citation_title", book)]
    tags += [("name", "citation_author", author_name(one)) for one in citation["authors"]]
    tags += [("name", "citation_publication_date", str(citation["year"]))]
    return "".join(
        f'\n<meta {kind}="{name}" content="{escape(value)}">' for kind, name, value in tags
    )


def author_name(author: dict[str, str]) -> str:
    """Return an author of CITATION.cff, a person or a group, as citation tags write it."""
    if "name" in author:
        return author["name"]
    return f"{author['family-names']}, {author['given-names']}"


def shortened(text: str) -> str:
    """Return a summary on one line, without a leading label, cut at a word where it is long."""
    text = LEAD.sub("", " ".join(text.split()))
    if len(text) <= LONGEST:
        return text
    return text[: LONGEST - 1].rsplit(" ", 1)[0].rstrip(",;:–") + "…"


def add_tags(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Put the tags into a page's head; its first paragraph is the summary."""
    paragraphs = doctree.findall(nodes.paragraph) if doctree is not None else iter(())
    first = next(paragraphs, None)
    book = app.config.html_title
    citation = yaml.safe_load((Path(app.srcdir) / "CITATION.cff").read_text(encoding="utf-8"))
    context["metatags"] = context.get("metatags", "") + head_tags(
        re.sub(r"<[^>]*>", "", context.get("title", book)),
        first.astext() if first is not None else book,
        book=book,
        site=site_of(app),
        page=page,
        citation=citation | {"year": app.config.copyright},
    )


def site_of(app: Sphinx) -> str:
    """Return the address of the published book."""
    return site_address(app.config.html_theme_options["repository_url"])


def write_not_found(app: Sphinx, exception: Exception | None) -> None:
    """Write `404.html`: whole in itself, for a server shows it at any depth of the site."""
    if exception is None:
        text = NOT_FOUND.format(title=escape(app.config.html_title), site=site_of(app))
        write_atomically(Path(app.outdir) / "404.html", text)


def setup(app: Sphinx) -> None:
    """Connect this part to the build."""
    app.connect("html-page-context", add_tags)
    app.connect("build-finished", write_not_found)
