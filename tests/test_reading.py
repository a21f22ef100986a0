"""The built book as a reader meets it: in a browser, from the disk, with the network cut.

Run by `make test-reading` after `make book`. Playwright drives an installed Chromium and downloads
none; axe-core comes with axe-playwright-python.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urldefrag, urljoin

import pytest
import yaml
from bs4 import BeautifulSoup

from lib.evidence.criteria import criteria
from lib.evidence.records import pages
from notebooks import site_address

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
PAGES = [*pages(ROOT), "search", "genindex"]
CHAPTERS = [page for page in PAGES if (ROOT / page).with_suffix(".ipynb").is_file()]
CLAIM_PAGES = [
    page for page in pages(ROOT) if Path(page).name in {one.claim for one in criteria()} | {"intro"}
]
EXPLORER = "book/depth-explorer"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None,
        reason=f"no browser: none of {', '.join(BROWSERS)} is on the PATH; set CHROMIUM to one",
    ),
    pytest.mark.skipif(
        not (SITE / "index.html").is_file(), reason="no built book: run `make book` first"
    ),
]

# What axe-core finds in the theme itself and cannot be mended from here: rule and selector.
THEMES_OWN: set[tuple[str, str]] = set()


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A browser that reaches no machine: names do not resolve and the proxy does not exist."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=BROWSER,
            proxy={"server": "http://127.0.0.1:9"},
            args=["--disable-gpu", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND"],
        )
        yield launched
        launched.close()


class Opened:
    """A page of the book, with everything that went wrong while it was open."""

    def __init__(self, browser, name: str, **options: object) -> None:
        self.name = name
        self.context = browser.new_context(viewport=WIDE, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("requestfailed", lambda request: self.errors.append(f"lost {request.url}"))

    def _console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def _request(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.outside.append(request.url)

    def go(self, query: str = ""):
        """Loads the page and waits until its formulas are set."""
        self.page.goto((SITE / f"{self.name}.html").as_uri() + query)
        self.page.evaluate("window.MathJax?.startup?.promise")
        return self.page


@pytest.fixture(scope="module", params=PAGES)
def opened(browser, request) -> Iterator[Opened]:
    """Each page of the book in turn, opened once for all tests that leave it as it is."""
    page = Opened(browser, request.param)
    page.go()
    yield page
    page.context.close()


@pytest.fixture
def fresh(browser) -> Iterator[Callable]:
    """Opens pages for tests that act on them."""
    contexts = []

    def open_page(name: str, query: str = "", **options: object):
        page = Opened(browser, name, **options)
        contexts.append(page.context)
        return page.go(query)

    yield open_page
    for context in contexts:
        context.close()


def test_page_opens_without_errors_and_asks_no_other_machine(opened):
    assert not opened.errors, "\n".join(opened.errors)
    assert not opened.outside, "\n".join(opened.outside)


def test_every_formula_is_typeset(opened):
    formulas = opened.page.evaluate(
        """() => [...document.querySelectorAll(".math")].map(node => ({
            text: node.textContent.slice(0, 60),
            drawn: (node.querySelector("mjx-container svg")?.getBoundingClientRect().width ?? 0) > 0
                || !node.checkVisibility(),
            wrong: node.querySelector("[data-mml-node=merror]") !== null,
        }))"""
    )
    assert [one for one in formulas if one["wrong"] or not one["drawn"]] == []
    source = ROOT / f"{opened.name}.md"
    if source.is_file() and "$" in source.read_text(encoding="utf-8"):
        assert formulas
    assert "\\(" not in opened.page.inner_text("main")


def test_every_figure_has_a_size_and_alternative_text(opened):
    figures = opened.page.evaluate(
        """() => [...document.querySelectorAll("article.bd-article img")].map(image => ({
            source: image.src.slice(0, 120), alt: image.alt, pixels: image.naturalWidth,
            width: image.getBoundingClientRect().width,
            height: image.getBoundingClientRect().height,
            seen: image.checkVisibility(),
        }))"""
    )
    for figure in figures:
        assert figure["pixels"] >= 600, figure
        assert len(figure["alt"]) > 20 and not re.search(r"\.(png|svg)$", figure["alt"]), figure
        if figure["seen"]:
            assert figure["width"] > 200 and figure["height"] > 60, figure
    if opened.name in CHAPTERS and "explorer" not in opened.name:  # a script draws its figure
        assert figures


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(opened, scheme):
    from axe_playwright_python.sync_playwright import Axe

    opened.page.emulate_media(color_scheme=scheme)
    opened.page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
    found = Axe().run(opened.page, options={"resultTypes": ["violations"]})
    serious = [
        (violation["id"], node["target"][-1], node["html"][:120])
        for violation in found.response["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
    serious = [one for one in serious if one[:2] not in THEMES_OWN]
    assert not serious, "\n".join(map(" ".join, serious))


def test_dark_mode_is_dark_and_figures_keep_a_light_card(opened):
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    brightness = """selector => [...document.querySelectorAll(selector)].map(node => {
        const [r, g, b, a] = getComputedStyle(node).backgroundColor.match(/[\\d.]+/g).map(Number);
        return a === 0 ? null : (r + g + b) / 765;
    })"""
    (page,) = opened.page.evaluate(brightness, "body")
    assert page is not None and page < 0.2
    cards = opened.page.evaluate(brightness, "article.bd-article img")
    assert all(card is not None and card > 0.9 for card in cards)
    filters = """() => [...document.querySelectorAll("article.bd-article img")]
        .map(node => getComputedStyle(node).filter)"""
    assert set(opened.page.evaluate(filters)) <= {"none"}  # nothing dims what was drawn on white


def test_on_a_phone_nothing_widens_the_page_and_wide_tables_scroll(opened):
    opened.page.set_viewport_size(NARROW)
    try:
        wide = opened.page.evaluate(
            """() => {
                const root = document.scrollingElement, width = root.clientWidth;
                const held = node => node && node !== document.body
                    && (getComputedStyle(node).overflowX !== "visible" || held(node.parentElement));
                return {
                    page: root.scrollWidth - width,
                    parts: [...document.querySelectorAll("article.bd-article *")]
                        .filter(node => node.getBoundingClientRect().right > width + 1
                            && !held(node.parentElement)
                            && getComputedStyle(node).position !== "absolute")
                        .map(node => node.outerHTML.slice(0, 120)),
                    still: [...document.querySelectorAll("article.bd-article table")]
                        .filter(table => table.scrollWidth > width
                            && !["auto", "scroll"].includes(
                                getComputedStyle(table.parentElement).overflowX))
                        .map(table => table.outerHTML.slice(0, 120)),
                };
            }"""
        )
    finally:
        opened.page.set_viewport_size(WIDE)
    assert wide == {"page": 0, "parts": [], "still": []}


# Acting on the pages


def test_slider_moves_the_map(fresh):
    page = fresh(EXPLORER)
    places = """() => [...document.querySelectorAll(".depth-explorer .task:not([hidden]) .item")]
        .map(item => item.style.transform)"""
    slider = page.locator(".depth-explorer input[type=range]")
    slider.focus()
    for key, block in (("Home", "0"), ("End", slider.get_attribute("max"))):
        before = page.evaluate(places)
        page.keyboard.press(key)
        after = page.evaluate(places)
        assert slider.input_value() == block
        assert page.locator(".depth-explorer output").inner_text().startswith(f"block {block} of")
        assert len(after) > 10
        assert sum(one != other for one, other in zip(before, after, strict=True)) > len(after) / 2


def test_the_explorer_shows_a_recorded_model_at_the_same_share_of_its_depth(fresh):
    page = fresh(EXPLORER)
    groups = page.locator(".depth-explorer optgroup")
    assert groups.count() >= 2  # this build's model, and those that are recorded
    slider = page.locator(".depth-explorer input[type=range]")
    slider.fill(slider.get_attribute("max"))
    other = groups.last.locator("option").last.get_attribute("value")
    page.locator(".depth-explorer .choice").select_option(other)
    last = slider.get_attribute("max")
    assert slider.input_value() == last
    assert page.locator(".depth-explorer output").inner_text().startswith(f"block {last} of")
    page.goto(page.url.split("#")[0] + f"#explore={other},{last}")
    page.reload()
    assert slider.input_value() == last == slider.get_attribute("max")


def test_the_address_keeps_the_explorers_view(fresh):
    page = fresh(EXPLORER, "#explore=1,3,2")
    slider = page.locator(".depth-explorer input[type=range]")
    assert slider.input_value() == "3"
    assert page.locator(".depth-explorer .choice").input_value() == "1"
    assert page.locator(".depth-explorer .task:not([hidden]) .prompt").input_value() == "2"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("location.hash") == "#explore=1,4,2"


def test_two_models_stand_side_by_side_at_the_same_share_of_their_depths(fresh):
    page = fresh(EXPLORER)
    explorer = page.locator(".depth-explorer")
    other = explorer.locator(".beside optgroup").last.locator("option").first
    explorer.locator(".beside").select_option(other.get_attribute("value"))
    left, right = explorer.locator(".task:not([hidden])").all()
    assert right.bounding_box()["x"] > left.bounding_box()["x"] + left.bounding_box()["width"]
    slider = explorer.locator("input[type=range]")
    for share in (0, 0.5, 1):
        slider.fill(str(round(share * int(slider.get_attribute("max")))))
        found = [re.search(r"block (\d+) of 0–(\d+)", one.locator(".where").inner_text())
                 for one in (left, right)]  # fmt: skip
        (block, last), (beside, depth) = [(int(one[1]), int(one[2])) for one in found]
        assert str(block) == slider.input_value() and beside == round(block / last * depth)
        assert depth != last
    address = page.evaluate("location.hash")
    assert address.count(",") == 4
    page.reload()
    assert explorer.locator(".task:not([hidden])").count() == 2
    assert page.evaluate("location.hash") == address
    explorer.locator(".beside").select_option(explorer.locator(".choice").input_value())
    assert explorer.locator(".task:not([hidden])").count() == 1  # nothing beside itself
    assert not explorer.locator(".where").first.is_visible()


def test_no_line_of_code_is_cut(opened):
    cut = opened.page.evaluate(
        """() => [...document.querySelectorAll("article.bd-article .cell_input pre")]
            .filter(node => node.scrollWidth > node.clientWidth + 1 && node.checkVisibility())
            .map(node => node.textContent.slice(0, 200))"""
    )
    assert cut == []


def test_the_first_figure_is_seen_without_much_scrolling(opened):
    if opened.name not in CLAIM_PAGES:
        pytest.skip("no claim, no figure")
    opened.page.emulate_media(color_scheme="light")
    top = opened.page.evaluate(
        """() => {
            const image = document.querySelector("article.bd-article img");
            return image && image.getBoundingClientRect().top + scrollY;
        }"""
    )
    assert top is not None and top < 1200


def test_a_chapter_shows_its_answer_as_a_table_before_its_first_figure(opened):
    if opened.name not in CLAIM_PAGES:
        pytest.skip("no claim, no answer")
    assert opened.page.evaluate(
        """() => {
            const table = document.querySelector("article.bd-article table");
            const image = document.querySelector("article.bd-article img");
            const code = document.querySelector("article.bd-article .cell_input");
            const before = (one, other) => !other || Boolean(
                one.compareDocumentPosition(other) & Node.DOCUMENT_POSITION_FOLLOWING);
            return table !== null && before(table, code)
                && (location.pathname.endsWith("intro.html") || before(table, image))
                && before(image, code);
        }"""
    )


def test_every_glued_number_came_through(opened):
    pasted = opened.page.evaluate(
        "[...document.querySelectorAll('article.bd-article .pasted-text')].map(n => n.textContent)"
    )
    wrong = [one for one in pasted if one.strip() in ("", "…", "nan", "None", "inf")]
    assert not wrong
    prose = opened.page.evaluate(
        "[...document.querySelectorAll('article.bd-article :is(p, figcaption, td)')]"
        ".map(n => n.textContent).join(' ')"
    )
    assert "{glue" not in prose and "glue:text" not in prose


def test_the_answer_at_a_glance_says_verdicts_in_words_beside_their_shapes(soups):
    card = soups[(SITE / "book/intro.html").as_uri()].select_one("table.scorecard")
    assert card.select("tr.claim a[href]")
    verdicts = [
        cell.get_text() for row in card.select("tbody tr") for cell in row.select("td")[-1:]
    ]
    assert all(
        re.match(r"([●○◐–] |no result|chapter to come|[^:]+: [●○◐–] )", one) for one in verdicts
    )
    for drawing in card.select("svg"):
        assert drawing["role"] == "img" and len(drawing["aria-label"]) > 20


def test_search_finds_each_page_by_its_words(fresh):
    words = {name: _title(name) for name in pages(ROOT)}
    words["book/glossary"] = "unembedding donor recipient"
    page = fresh("search")
    for name, text in words.items():
        page.goto((SITE / "search.html").as_uri() + f"?q={quote(text)}")
        page.wait_for_selector("#search-results ul.search > li > a")
        found = page.evaluate(
            "[...document.querySelectorAll('#search-results ul.search > li > a')].map(a => a.href)"
        )
        assert any(f"{name}.html" in link for link in found), f"{text!r} does not find {name}"


def test_search_from_the_disk_makes_no_error(browser):
    page = Opened(browser, "search")
    page.go("?q=block").wait_for_selector("#search-results li")
    assert page.errors == []
    page.context.close()


def test_everything_can_be_reached_by_keyboard(fresh):
    page = fresh(CHAPTERS[0])
    where = """() => {
        const at = document.activeElement;
        return at.closest("#pst-skip-link") ? "skip link"
            : at.closest("article summary") ? "folded code"
            : at.closest(".bd-sidebar-primary nav") ? "contents of the book"
            : at.closest(".bd-sidebar-secondary nav") ? "contents of the page"
            : at.closest(".prev-next-area") ? "previous and next"
            : at.closest(".theme-switch-button") ? "theme"
            : at.closest(".search-button, .search-button-field") ? "search"
            : at.closest(".table-scroll") ? "table" : at.tagName;
    }"""
    wanted = {
        "folded code",
        "contents of the book",
        "contents of the page",
        "previous and next",
        "theme",
        "search",
        "table",
    }
    page.keyboard.press("Tab")
    assert page.evaluate(where) == "skip link"
    for _ in range(300):
        page.keyboard.press("Tab")
        wanted.discard(page.evaluate(where))
        if not wanted:
            break
    assert not wanted


def test_skip_link_leads_past_the_navigation(fresh):
    page = fresh(CHAPTERS[0])
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_folded_code_opens_by_keyboard_and_focus_is_seen(fresh):
    page = fresh(CHAPTERS[0])
    summary = page.locator("article details.hide > summary").first
    summary.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert summary.evaluate(
        "node => getComputedStyle(node).outlineStyle !== 'none'"
        " || getComputedStyle(node).boxShadow !== 'none'"
    )
    page.keyboard.press("Enter")
    assert summary.evaluate("node => node.parentElement.open")


# Links, without a browser


def _title(name: str) -> str:
    heading = BeautifulSoup((SITE / f"{name}.html").read_text("utf-8"), "html.parser").h1
    return heading.get_text().rstrip("#").strip()


@pytest.fixture(scope="module")
def soups() -> dict[str, BeautifulSoup]:
    """All pages of the site by address, parsed."""
    return {
        file.as_uri(): BeautifulSoup(file.read_text("utf-8"), "html.parser")
        for file in SITE.rglob("*.html")
        if "_static" not in file.parts
    }


def test_every_internal_link_and_download_leads_somewhere(soups):
    targets = {
        page: {node["id"] for node in soup.find_all(id=True)} for page, soup in soups.items()
    }
    dead = []
    for page, soup in soups.items():
        for node in soup.find_all(["a", "img", "link", "script"]):
            reference = node.get("href") or node.get("src")
            if not reference or re.match(r"(https?|mailto|data|javascript):", reference):
                continue
            address, anchor = urldefrag(urljoin(page, reference))
            file = Path(unquote(address.removeprefix("file://").split("?")[0]))
            if not file.is_file():
                dead.append(f"{page}: {reference}")
            elif anchor and anchor not in targets.get(address, {anchor}):
                dead.append(f"{page}: no {reference}")
    assert not dead, "\n".join(dead)


@pytest.mark.parametrize("name", CHAPTERS)
def test_links_of_the_notebooks_into_the_book_lead_somewhere(soups, name):
    repository = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]
    text = (ROOT / name).with_suffix(".ipynb").read_text("utf-8")
    links = re.findall(rf"\({re.escape(site_address(repository))}/([^)]*)\)", text)
    assert links
    for link in links:
        page, anchor = urldefrag(link)
        soup = soups[(SITE / page).as_uri()]
        assert not anchor or soup.find(id=anchor), link


@pytest.mark.parametrize("name", pages(ROOT))
def test_page_offers_what_a_reader_needs(soups, name):
    soup = soups[(SITE / f"{name}.html").as_uri()]
    repository = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]
    links = [node["href"] for node in soup.find_all("a", href=True)]
    url, branch = repository["url"], repository["branch"]
    assert f"{url}/edit/{branch}/{name}.md" in links
    assert any(link.startswith(f"{url}/issues/new?") for link in links)
    if name in CHAPTERS:
        notebook = f"{url.removeprefix('https://github.com/')}/blob/{branch}/{name}.ipynb"
        assert f"https://colab.research.google.com/github/{notebook}" in links
        assert any(link.endswith(f"_sources/{name}.ipynb") for link in links)
    footer = soup.select_one(".bd-footer-content").get_text(" ")
    assert re.search(r"Last updated on \d{4}-\d\d-\d\d", footer)
    assert re.search(r"Version \d+\.\d+\.\d+", footer)
    assert soup.select_one(".prev-next-area a")
