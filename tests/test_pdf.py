import pytest
from bs4 import BeautifulSoup
from claimed import invented
from PIL import Image

import pdf
from executable_book import scorecard
from lib.evidence.criteria import criteria, judged
from lib.reading.words import record_text

PAGE = """<html><head><script src="../_static/x.js"></script></head><body><nav>left out</nav>
<article class="bd-article"><h1 id="method">{title}</h1>{text}
<details class="hide"><summary>code</summary>folded</details></article></body></html>"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "book").mkdir()
    first = '<a href="b.html#method">b</a> <a href="#method">here</a> <a href="b.html">all</a>'
    second = '<a href="../_images/x.png"><img src="../_images/x.png"></a> <a href="https://example.org/">out</a>'
    for name, text in (("a", first), ("b", second)):
        (tmp_path / "book" / f"{name}.html").write_text(PAGE.format(title=name, text=text))
    return tmp_path


def test_links_between_pages_lead_into_the_one_document(site):
    whole = BeautifulSoup(pdf.whole_book(["book/a", "book/b"], site), "html.parser")
    links = [link["href"] for link in whole.find_all("a", href=True)]
    inside = [link[1:] for link in links if link.startswith("#")]
    assert len(inside) == 3
    assert links[3:] == ["https://example.org/"]  # and none to a file
    ids = [node["id"] for node in whole.find_all(id=True)]
    assert len(ids) == len(set(ids))
    targets = [whole.find(id=one).get_text().split()[0] for one in inside]
    assert targets == ["b", "a", "b"]


def test_only_articles_are_printed_in_order_and_folded_code_is_not(site):
    whole = BeautifulSoup(pdf.whole_book(["book/b", "book/a"], site), "html.parser")
    assert [heading.get_text() for heading in whole.find_all("h1")] == ["b", "a"]
    assert "left out" not in whole.get_text()
    assert "folded" not in whole.get_text()
    assert whole.img["src"] == (site / "_images" / "x.png").as_uri()
    assert whole.script["src"] == (site / "_static" / "x.js").as_uri()


def test_missing_pages_and_browsers_are_named_with_what_to_do(site, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"No page book/c. Run `make book` first"):
        pdf.whole_book(["book/a", "book/c"], site)
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="set CHROMIUM"):
        pdf.find_browser()


LANDING = """<html><head></head><body><article class="bd-article"><section id="book"><h1>Book</h1>
<figure><img src="x.png"></figure><section id="the-answer-at-a-glance"><h2>Answer</h2>
<table class="scorecard"><tr><td>supported</td></tr></table>{text}</section>
<section id="later"><h2>Later</h2></section></section></article></body></html>"""


@pytest.fixture
def landing(tmp_path, monkeypatch):
    (tmp_path / "first.html").write_text(LANDING.format(text="<p>long</p>" * 90))
    Image.new("RGB", (300, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(pdf, "pages", lambda root: ["first"])
    return tmp_path


def test_summary_ends_with_the_answer_at_a_glance(landing):
    whole = BeautifulSoup(pdf.summary(landing), "html.parser")
    assert [one.get_text() for one in whole.find_all(["h1", "h2"])] == ["Book", "Answer"]
    assert whole.img and whole.select_one("table.scorecard")
    (landing / "first.html").write_text(PAGE.format(title="a", text=""))
    with pytest.raises(FileNotFoundError, match=r"no section .* Run `make book` first"):
        pdf.summary(landing)


SCORECARD = """<p class="scorecard-legend"><span class="key">m</span> signs</p>
<table class="scorecard"><thead><tr><th>Claim, effect</th><th><svg></svg></th>
<th>Number [interval]</th><th class="wanted">Wanted</th><th>Verdict</th></tr></thead><tbody>{}
</tbody></table>"""


def summary_rows(landing, *shown):
    """The rows of the summary's table, of a first page whose scorecard has these rows."""
    page = (landing / "first.html").read_text()
    table = str(BeautifulSoup(page, "html.parser").select_one("table.scorecard"))
    (landing / "first.html").write_text(page.replace(table, SCORECARD.format("".join(shown))))
    whole = BeautifulSoup(pdf.summary(landing), "html.parser")
    return [
        [cell.get_text(" ", strip=True) for cell in row.find_all(["th", "td"])]
        for row in whole.select("table.scorecard tr")
    ]


def test_summary_gives_each_model_a_column_with_number_sign_and_twins(landing):
    effect, of_small = criteria("phase-transition")[0], criteria("why-angles")[0]
    runs = {
        "one": invented("phase-transition", "one"),
        "two": invented("phase-transition", "two", met=False),
        "like one": invented("phase-transition", "like one"),
        "small": invented("why-angles", "small"),
    }
    (own, twins), (lost, _), _, (alone, others) = (
        [row for row in rows if row["statistic"] == one.statistic and judged(row)]
        for one, rows in zip((effect, effect, effect, of_small), runs.values(), strict=True)
    )
    lost |= {"estimate": None, "verdict": "not testable"}
    shown = [
        scorecard._claim_row("phase-transition", "It is so.", None, runs),
        *scorecard._effect_rows(effect, None, runs),
        *scorecard._effect_rows(of_small, None, runs),
    ]
    assert summary_rows(landing, *shown) == [
        ["Claim, effect", "Wanted", "one", "two", "like one"],
        ["It is so.", "", "● supported", "○ refuted", "● supported"],
        [
            f"{effect.text} (3 tasks)",
            effect.wanted,
            f"{record_text(own)} ● twins: {record_text(twins)} ○",
            f"– – twins: {record_text(twins)} ○",
            f"{record_text(own)} ● twins: {record_text(twins)} ○",
        ],
        [
            of_small.text,
            of_small.wanted,
            f"{record_text(alone)} ● twins: {record_text(others)} ○",
        ],
    ]
    whole = BeautifulSoup(pdf.summary(landing), "html.parser")
    assert [cell["colspan"] for cell in whole.select("table.scorecard [colspan]")] == ["3"]
    assert whole.select_one(".scorecard-legend").get_text(strip=True) == "signs"


def test_summary_leaves_a_cell_for_each_model_that_did_not_run_a_claim(landing):
    runs = {
        name: invented("phase-transition", name)
        + (invented("norm-code", name) if name == "one" else [])
        for name in ("one", "two", "three")
    }
    told = scorecard._effect_rows(criteria("norm-code")[0], None, runs)
    claims = scorecard._claim_row("phase-transition", "It is so.", None, runs)
    rows = summary_rows(landing, claims, *told)
    assert {len(row) for row in rows} == {5}
    assert rows[-1][3:] == ["", ""]


def test_summary_of_one_model_has_one_column_and_no_cell_spans_two(landing):
    effect = criteria("phase-transition")[0]
    runs = {"one": invented("phase-transition", "one")}
    own, twins = (
        one for one in runs["one"] if one["statistic"] == effect.statistic and judged(one)
    )
    assert summary_rows(
        landing,
        scorecard._claim_row("phase-transition", "It is so.", None, runs),
        *scorecard._effect_rows(effect, None, runs),
    ) == [
        ["Claim, effect", "Wanted", "one"],
        ["It is so.", "", "● supported"],
        [
            f"{effect.text} (3 tasks)",
            effect.wanted,
            f"{record_text(own)} ● twins: {record_text(twins)} ○",
        ],
    ]
    assert "colspan" not in pdf.summary(landing)


@pytest.mark.browser
def test_summary_is_one_sheet_however_long(landing):
    html = pdf.summary(landing)
    pdf.print_pdf(html, landing / "many.pdf")
    assert pdf.n_sheets(landing / "many.pdf") > 1
    pdf.print_pdf(html, landing / "one.pdf", one_sheet=True)
    assert pdf.n_sheets(landing / "one.pdf") == 1


def test_without_a_browser_one_line_says_so(landing, monkeypatch):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(pdf, "SUMMARY", landing / "s.pdf")
    monkeypatch.setattr(pdf, "summary", lambda: "<html></html>")
    with pytest.raises(SystemExit, match=r"^No browser: [^\n]*$"):
        pdf.main("summary")
    assert not list(landing.glob("s.*"))
