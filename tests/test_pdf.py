import pytest
from bs4 import BeautifulSoup

import pdf

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
