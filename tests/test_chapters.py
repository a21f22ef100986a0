"""The chapters' text: an answer first, short, and no number of a result typed by hand."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from lib.evidence.criteria import criteria
from lib.evidence.records import pages

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {one.claim for one in criteria()}
CHAPTERS = [page for page in pages(ROOT) if Path(page).name in CLAIMS]
FOLDED = {"hide-input", "hide-cell", "remove-cell", "remove-input"}
METHOD = {"0.8"}
"""What a method may state beside its thresholds: the gate."""
FIRST = "What would have refuted it", "{code-cell}"


def text_of(chapter: str) -> str:
    return (ROOT / f"{chapter}.md").read_text(encoding="utf-8")


def shown_cells(chapter: str) -> list[str]:
    return [
        cell.source
        for cell in jupytext.read(ROOT / f"{chapter}.md").cells
        if cell.cell_type == "code" and not FOLDED & set(cell.metadata.get("tags", []))
    ]


def prose_of(text: str) -> str:
    """What is read as sentences: no header, cells, fences, options, tables or equations."""
    for left_out in (
        r"\A---\n.*?^---$",
        r"^```\{code-cell\}.*?^```$",
        r"^\$\$.*?\$\$$",
        r"^:[\w-]+:.*$",
        r"^\|.*$",
        r"^(?:`{3,}|:{3,}).*$",
    ):
        text = re.sub(left_out, "", text, flags=re.M | re.S if ".*?" in left_out else re.M)
    return re.sub(r"\{(?:glue:text|cite\S*)\}`[^`]*`", "x", text)


def typed_decimals(text: str, allowed: set[str]) -> list[str]:
    """Numbers with decimals in prose and captions, but for those of models' names."""
    captions = [caption for _, caption in drawn_figures(text)]
    read = re.sub(r"`[^`]*`", "x", "\n".join([prose_of(text), *captions]))
    read = re.sub(r"\b(?:Llama|Qwen|SmolLM|Mistral 7B v)[\w.]*(?: \d\.\d)?", "x", read)
    return [one for one in re.findall(r"\d+\.\d+", read) if one not in allowed]


def drawn_figures(text: str) -> list[tuple[str, str]]:
    """Alternative text and caption of each figure that a cell draws in its place."""
    cells = jupytext.reads(text, fmt="md:myst").cells
    drawn = [cell.metadata["mystnb"] for cell in cells if "mystnb" in cell.metadata]
    return [(one["image"].get("alt", ""), one["figure"]["caption"]) for one in drawn]


def figures_of(text: str) -> list[tuple[str, str]]:
    """Alternative text and caption of each figure: those glued at the top, then those drawn."""
    glued = re.findall(
        r"^```\{glue:figure\}[^\n]*\n((?::[^\n]*\n)*)\n(.*?)^```$", text, flags=re.M | re.S
    )
    tops = [("".join(re.findall(r":alt: *(.*)", options)), words) for options, words in glued]
    return tops + drawn_figures(text)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_code_that_is_shown_fits_its_column_and_is_rarely_long(chapter):
    cells = shown_cells(chapter)
    wide = [line for cell in cells for line in cell.splitlines() if len(line) > 79]
    assert not wide, "\n".join(wide)
    lengths = sorted(len(cell.splitlines()) for cell in cells)
    assert sum(length > 20 for length in lengths) <= 1 and lengths[-1] <= 30, lengths


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_claim_answer_and_main_figure_come_before_any_code(chapter):
    text = text_of(chapter)
    order = ["**The claim", "```{glue} answer", "```{glue:figure} main", *FIRST]
    places = [text.find(one) for one in order]
    assert -1 not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)
    assert "## What this does not show" in text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_is_read_in_five_minutes(chapter):
    text = text_of(chapter)
    assert len(prose_of(text).split()) <= 1200
    assert 1 <= len(figures_of(text)) <= 8


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_figures_have_captions_and_alternative_text_without_numbers(chapter):
    for alt, caption in figures_of(text_of(chapter)):
        assert len(caption.split()) > 8, caption
        assert not re.search(r"\d", alt), alt
    main, *others = figures_of(text_of(chapter))
    assert all(len(alt) > 20 for alt, _ in others), others
    assert len(main[1].split()) > 8  # its alternative text may be written by what draws it


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_number_of_a_result_is_typed(chapter):
    thresholds = {str(one.threshold) for one in criteria(Path(chapter).name)}
    assert typed_decimals(text_of(chapter), METHOD | thresholds) == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_blocks_are_chosen_on_the_trained_model_before_any_twin_is_read(chapter):
    cells = jupytext.read(ROOT / f"{chapter}.md").cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    chosen = r"\b(?:transition_block|find_windows|late_blocks|\w+_late_blocks|control_block)\("
    places = [found.start() for found in re.finditer(chosen, code)]
    twins = re.search(r"load_decoder\([^)]*untrained=True", code)
    assert twins is None or all(place < twins.start() for place in places)
    assert set(re.findall(r"transition_block\((\w+)\)", code)) <= {"decoder"}


HEAD = """---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_twin_has_a_name_that_outlives_its_measurement(chapter):
    """Of a network of a billion parameters a machine holds the trained one and one twin."""
    cells = jupytext.read(ROOT / f"{chapter}.md").cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    named = [
        ast.unparse(one)
        for part in ast.parse(code).body
        if not isinstance(part, ast.FunctionDef)
        for one in ast.walk(part)
        if isinstance(one, ast.Assign) and "untrained=True" in ast.unparse(one)
        if ast.unparse(one.value).startswith("load_decoder(")
    ]
    assert named == []


def test_typed_numbers_are_found_wherever_they_are_read():
    text = HEAD + "Of 0.41, {glue:text}`a:.2f`, `b == 0.2`, Qwen2.5 7B, Llama 3.1 8B, gate 0.8.\n\n"
    text += "```{glue:figure} main\n:alt: A line.\n\nIt rises by 0.42.\n```\n\n"
    text += "```{code-cell} ipython3\n---\nmystnb:\n  image: {alt: A curve.}\n  figure:\n"
    text += "    caption: |\n      Falls by 0.43.\n---\nx = 0.44\n```\n"
    assert typed_decimals(text, {"0.8"}) == ["0.41", "0.42", "0.43"]
    assert figures_of(text) == [
        ("A line.", "It rises by 0.42.\n"),
        ("A curve.", "Falls by 0.43.\n"),
    ]


def test_words_are_counted_where_sentences_are():
    text = "One two {glue:text}`a b`.\n\n```{margin}\nthree\n```\n\n$$\nx = y\n$$\n\n| a | b |\n"
    assert prose_of(text).split() == ["One", "two", "x.", "three"]


@pytest.mark.parametrize("page", [one for one in pages(ROOT) if (ROOT / f"{one}.ipynb").is_file()])
def test_no_cell_uses_a_name_that_nothing_gives(page):
    """Told in a second, not after the minutes that the cells before it take."""
    cells = jupytext.read(ROOT / f"{page}.md").cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    asked = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(asked, input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
