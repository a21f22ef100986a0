"""Prints the built book as one PDF. Run by `make pdf`, after `make book`.

The articles of all pages are put into one page, in the order of the book, and an installed
Chromium prints it, so that page numbers run through and links between pages lead into the PDF.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.evidence.records import pages  # noqa: E402

SITE = ROOT / "_build" / "html"
PDF = ROOT / "_build" / "prediction-geometry.pdf"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LEFT_OUT = ".headerlink, .copybtn, details.hide, .depth-map .controls, script"
FOOTER = (
    '<div style="font: 8px system-ui, sans-serif; color: #444; width: 100%; text-align: center">'
    '<span class="pageNumber"></span></div>'
)


def find_browser() -> str:
    """Returns the path of a Chromium: the environment variable CHROMIUM, else one on the PATH.

    Raises:
        FileNotFoundError: if there is none.
    """
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise FileNotFoundError(
            f"No browser: none of {', '.join(BROWSERS)} is on the PATH. "
            "Install Chromium, or set CHROMIUM to the path of one."
        )
    return found


def whole_book(names: list[str], site: Path = SITE) -> str:
    """Returns one HTML page that holds the articles of the named pages, one after the other.

    Every id begins with its page's name, and every link to a page of the book becomes a link
    inside this page; other references become absolute.

    Raises:
        FileNotFoundError: if a page is missing.
    """
    missing = [name for name in names if not (site / f"{name}.html").is_file()]
    if missing:
        raise FileNotFoundError(f"No page {', '.join(missing)}. Run `make book` first.")
    addresses = {(site / f"{name}.html").as_uri(): name for name in names}
    parsed: dict[str, Any] = {
        name: BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        for name in names
    }
    whole: Any = parsed[names[0]]
    articles: list[Any] = []
    for address, name in addresses.items():
        article: Any = parsed[name].select_one("article.bd-article")
        for part in article.select(LEFT_OUT):
            part.decompose()
        _rewrite(article, address, name, addresses)
        article["id"] = _anchor(name)
        articles.append(article)
    for node in whole.head.find_all(["link", "script"]):
        _rewrite(node, next(iter(addresses)), names[0], {})
    whole.body.clear()
    whole.body.attrs = {"class": "whole-book"}
    whole.body.extend(articles)
    whole.html["data-theme"] = whole.html["data-mode"] = "light"
    return str(whole)


def _anchor(name: str, fragment: str = "") -> str:
    return f"{name.replace('/', '-')}--{fragment}" if fragment else name.replace("/", "-")


def _rewrite(root: Any, address: str, name: str, addresses: dict[str, str]) -> None:
    for node in [root, *root.find_all(True)]:
        for key in [key for key in node.attrs if key in ("href", "src")]:
            target, fragment = urldefrag(urljoin(address, node[key]))
            if target in addresses:
                node[key] = f"#{_anchor(addresses[target], fragment)}"
            else:
                node[key] = urljoin(address, node[key])
        if node.name == "a" and node.get("href", "").startswith("file:"):
            del node["href"]  # a figure's link to itself: a path of this machine in the PDF
        if "id" in node.attrs:
            node["id"] = _anchor(name, node["id"])
        for key in ("aria-labelledby", "aria-describedby", "for"):
            if key in node.attrs:
                node[key] = _anchor(name, str(node[key]))


def print_pdf(html: str, pdf: Path = PDF) -> None:
    """Writes a PDF of a page, with an outline of its headings and numbered sheets of A4."""
    from playwright.sync_api import sync_playwright

    source = pdf.with_suffix(".html")
    source.write_text(html, encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--disable-gpu", "--disable-quic"]
        )
        page = browser.new_page(color_scheme="light")
        page.goto(source.as_uri())
        page.evaluate("window.MathJax?.startup?.promise")
        page.pdf(
            path=pdf,
            format="A4",
            margin={"top": "18mm", "bottom": "18mm", "left": "18mm", "right": "18mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            print_background=True,
            outline=True,
            tagged=True,
        )
        browser.close()
    source.unlink()


def main() -> None:
    """Prints the book."""
    try:
        print_pdf(whole_book(pages(ROOT)))
    except FileNotFoundError as problem:
        sys.exit(str(problem))
    print(f"The PDF is at {PDF}")


if __name__ == "__main__":
    main()
