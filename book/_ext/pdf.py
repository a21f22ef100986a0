"""Prints the built book as one PDF, or its answer on one sheet; after `make book`.

Run by `make pdf`, and with the word "summary" by `make summary`.

The articles of all pages are put into one page, in the order of the book, and an installed
Chromium prints it, so that page numbers run through and links between pages lead into the PDF.
"""

import os
import re
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
SUMMARY = ROOT / "_build" / "summary.pdf"
ANSWER = "the-answer-at-a-glance"  # the first page's section with the table
SCALES = (1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
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


def summary(site: Path = SITE) -> str:
    """Returns the landing page up to the end of the answer at a glance, as one HTML page.

    Raises:
        FileNotFoundError: the landing page is not built, or has no answer at a glance.
    """
    first = pages(ROOT)[0]
    whole: Any = BeautifulSoup(whole_book([first], site), "html.parser")
    answer = whole.find("section", id=_anchor(first, ANSWER))
    if answer is None:
        raise FileNotFoundError(f"{first} has no section {ANSWER}. Run `make book` first.")
    for later in answer.find_next_siblings():
        later.decompose()
    for table in whole.select("table.scorecard"):
        _put_models_side_by_side(whole, table)
    for colour in whole.select(".scorecard-legend .key"):
        colour.decompose()
    # A length beside the share, so that the picture shrinks with the text where the sheet is full.
    style = ".whole-book figure img { width: min(62%, 800px); height: auto }"
    whole.head.append(whole.new_tag("style", string=style))
    return str(whole)


def _put_models_side_by_side(whole: Any, table: Any) -> None:
    """Gives each model a column of what the scorecard tells of it: a sheet is wide.

    Columns are the models of the first claim; what is told of other networks spans them.
    """
    first = table.select_one("tr:has([data-model])")
    if first is None:
        return
    models = [line["data-model"] for line in first.select("[data-model]")]
    for row in table.select("tr"):
        claim, wanted = row.th, row.select_one(".wanted") or whole.new_tag("td")
        lines = row.select("[data-model]")
        if row.parent.name == "thead":
            cells = {model: whole.new_tag("th", string=model) for model in models}
        elif {line["data-model"] for line in lines} <= set(models):
            cells = {model: whole.new_tag("td") for model in models}
        else:
            others = whole.new_tag("td", colspan=len(models))
            cells = {line["data-model"]: others for line in lines}
        for line in lines:
            line.string = line["data-told"]
            cells[line["data-model"]].append(line.extract())
        claim.attrs.pop("colspan", None)
        row.clear()
        once = {id(cell): cell for cell in cells.values()}  # equal cells of two models are two
        row.extend([claim, wanted, *once.values()])


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


def print_pdf(html: str, pdf: Path = PDF, *, one_sheet: bool = False) -> None:
    """Writes a PDF of a page, with an outline of its headings and numbered sheets of A4.

    For one sheet, all is printed as much smaller as it takes.
    """
    from playwright.sync_api import sync_playwright

    browser_path = find_browser()
    source = pdf.with_suffix(".html")
    source.write_text(html, encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--disable-gpu", "--disable-quic"]
        )
        page = browser.new_page(color_scheme="light")
        page.goto(source.as_uri())
        page.evaluate("window.MathJax?.startup?.promise")
        margin = "10mm" if one_sheet else "18mm"
        for scale in SCALES:
            page.pdf(
                path=pdf,
                format="A4",
                scale=scale,
                margin={"top": margin, "bottom": margin, "left": margin, "right": margin},
                display_header_footer=not one_sheet,
                header_template="<span></span>",
                footer_template=FOOTER,
                print_background=True,
                outline=True,
                tagged=True,
            )
            if not one_sheet or n_sheets(pdf) == 1:
                break
        browser.close()
    source.unlink()


def n_sheets(pdf: Path) -> int:
    """Returns the number of sheets of a PDF that Chromium wrote."""
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))


def main(what: str = "book") -> None:
    """Prints the book, or its summary."""
    pdf = SUMMARY if what == "summary" else PDF
    try:
        html = summary() if what == "summary" else whole_book(pages(ROOT))
        print_pdf(html, pdf, one_sheet=what == "summary")
    except FileNotFoundError as problem:
        sys.exit(str(problem))
    print(f"The PDF is at {pdf}")


if __name__ == "__main__":
    main(*sys.argv[1:])
