"""Chapters in MyST, turned into notebooks of plain Markdown."""

import json
import re
from pathlib import Path

import pytest
from pybtex.database import parse_string

import notebooks
import setup_cells

ROOT = Path(__file__).resolve().parent.parent
SITE = "https://a.github.io/b"
BIBLIOGRAPHY = """
@misc{one2020, author = {{nobody}}, year = {2020}, title = {T}}
@misc{two2021, author = {Beck, Ada and van Dam, Carl}, year = {2021}, url = {https://x.org/2}}
@misc{many2022, author = {Fox, Eve and others}, year = {2022}, url = {https://x.org/3}}
"""


def plain(text: str) -> str:
    return notebooks.plain_markdown(
        text,
        site=SITE,
        bibliography=parse_string(BIBLIOGRAPHY, "bibtex"),
        title_of=lambda name: name.title(),
    )


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        ("a {term}`flip rate`.", f"a [flip rate]({SITE}/book/glossary.html#term-flip-rate)."),
        ("{term}`swapped <exchange>`", f"[swapped]({SITE}/book/glossary.html#term-exchange)"),
        ("so {cite}`one2020`", "so (nobody, 2020)"),
        (
            "{cite}`two2021,many2022`",
            "([Beck and van Dam, 2021](https://x.org/2); [Fox et al., 2022](https://x.org/3))",
        ),
        ("{cite:t}`two2021` say", "[Beck and van Dam (2021)](https://x.org/2) say"),
        ("```{margin}\nOne.\n\nTwo.\n```", "> One.\n>\n> Two."),
        (":::{margin}\nOne.\n:::\n\nText.", "> One.\n\nText."),
        (
            "```{dropdown} Why {term}`donor`?\n:icon: info\nOne.\n```",
            f"> **Why [donor]({SITE}/book/glossary.html#term-donor)?**\n>\n> One.",
        ),
        ("```{glue} answer\n```\n\nText.", "{glued}`answer`\n\nText."),
        (
            "```{glue:figure} main\n:alt: Two lines.\n\nThey cross.\n```",
            "{glued}`main`\n**Figure.** They cross.",
        ),
        ("[here](norm-code.md)", f"[here]({SITE}/book/norm-code.html)"),
        ("[](norm-code.md#how)", f"[Norm-Code]({SITE}/book/norm-code.html#how)"),
        ("Sweep\n: 32 pairs.", "**Sweep.** 32 pairs."),
        ("$h_{t}$, `code {x}`, **b**", "$h_{t}$, `code {x}`, **b**"),
        ("of {glue:text}`n:.2f`", "of {glue:text}`n:.2f`"),
    ],
)
def test_myst_becomes_what_a_notebook_shows(myst, markdown):
    assert plain(myst) == markdown


@pytest.mark.parametrize(
    "myst",
    ["{numref}`fig-a`", "```{figure} a.png\n```", "(label)=\n# Title", ":::{warning}\nA\n:::"],
)
def test_what_a_notebook_cannot_show_is_refused(myst):
    with pytest.raises(ValueError, match="no form in a notebook"):
        plain(myst)


CHAPTER = """\
---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Title

The verdict: {glue:text}`verdict`.

```{glue:figure} main
:name: fig-main

It rises.
```

```{code-cell} ipython3
:tags: [hide-input]

SETUP
```

Before.

In between {glue:text}`n`.

After.

```{code-cell} ipython3
---
tags: [remove-cell]
mystnb:
  figure:
    name: fig-some-thing
    caption: |
      {glue:text}`finding` Left: *a*.
---
draw()
```
"""


@pytest.fixture
def chapter(tmp_path) -> Path:
    (tmp_path / "book").mkdir()
    (tmp_path / "_config.yml").write_text("repository: {url: https://github.com/a/b}")
    (tmp_path / "book" / "references.bib").write_text(BIBLIOGRAPHY)
    file = tmp_path / "book" / "one.md"
    file.write_text(CHAPTER)
    return file


def test_computed_text_is_shown_by_cells_in_its_place_but_never_before_the_setup(chapter):
    cells = json.loads(notebooks.notebook_text(chapter, "SETUP"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"]).splitlines()[-2:]) for cell in cells] == [
        ("markdown", ["# Title"]),
        ("code", ["SETUP"]),
        ("code", ["The verdict: {glue:text}`verdict`.", '""")']),
        ("code", ["**Figure.** It rises.", '""")']),
        ("markdown", ["Before."]),
        ("code", ["In between {glue:text}`n`.", '""")']),
        ("markdown", ["After."]),
        ("code", ["draw()"]),
        ("code", ["**Figure “some thing”.** {glue:text}`finding` Left: *a*.", '""")']),
    ]
    folded = [cell["metadata"].get("cellView") for cell in cells]
    assert folded == [None, None, "form", "form", None, "form", None, "form", "form"]
    assert 'notebook.show_glued("main")' in "".join(cells[3]["source"])


def test_a_change_in_one_paragraph_leaves_the_other_cells_ids_alone(chapter):
    def ids() -> list[str]:
        notebook = json.loads(notebooks.notebook_text(chapter, "SETUP"))
        return [cell["id"] for cell in notebook["cells"]]

    before = ids()
    chapter.write_text(CHAPTER.replace("Before.", "Before this."))
    after = ids()
    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 1
    assert len(set(after)) == len(after)


def test_chapter_that_cannot_be_turned_is_named(chapter):
    chapter.write_text(CHAPTER.replace("After.", "{numref}`fig-some-thing`"))
    with pytest.raises(ValueError, match=r"one\.md: The role \{numref\}"):
        notebooks.notebook_text(chapter, "SETUP")


@pytest.mark.parametrize("file", setup_cells.chapters(), ids=lambda file: file.stem)
def test_no_notebook_shows_raw_myst(file):
    for cell in json.loads(file.with_suffix(".ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            assert not re.search(r"\{[a-z:+-]+\}`.+`|^(```|:::)\{|^\(.+\)=$", source, re.M), source
