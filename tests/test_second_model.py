"""The whole book on another model: tiny, from a local folder, and unable to do any task."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lib.embedded import fetch_embedded_model
from lib.results import ROOT, VERDICTS, pages
from lib.verdicts import criteria

CLAIMS = dict.fromkeys(criterion.claim for criterion in criteria())
SMALLER = {"N_DRAWS": 100, "N_PERMUTATIONS": 40, "N_CONTEXTS": 120}  # in the parameter cells
GAP = re.compile(r"(?<![\w.])(nan|NaN|None|inf|<NA>)(?![\w.])")


def save_tiny_model(folder: Path) -> None:
    """Write a Llama-like model with the embedded model's tokenizer.

    The first two blocks have no attention, so that after them prompts that end alike have equal
    states: what is not defined on such states is part of the test.
    """
    tokenizer = AutoTokenizer.from_pretrained(fetch_embedded_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the book, built as `make book MODEL=folder` does, on smaller samples."""
    folder = tmp_path_factory.mktemp("book")
    save_tiny_model(folder / "tiny-llama")
    for name in ("_config.yml", "_toc.yml", "requirements.txt", "environment.yml"):
        shutil.copy(ROOT / name, folder)
    for name in ("lib", "book", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in pages(folder):
        file = folder / f"{page}.md"
        text = file.read_text(encoding="utf-8")
        for name, number in SMALLER.items():
            text = re.sub(rf"^{name} = \d+", f"{name} = {number}", text, flags=re.M)
        file.write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PROGRESS_FILE"}
    environment |= {"MODEL": str(folder / "tiny-llama"), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "."]
    done = subprocess.run(
        [*command, "--warningiserror", "--keep-going"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def prose(book: Path, page: str) -> str:
    """Return a page's text without code, outputs of code, and data of figures."""
    text = (book / "_build" / "html" / f"{page}.html").read_text(encoding="utf-8")
    article = re.search(r"<article.*?</article>", text, re.S)
    assert article
    bare = re.sub(r"<(script|style|pre|svg)\b.*?</\1>", " ", article[0], flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", bare)))


def test_each_claim_has_records_and_none_is_supported(book: Path) -> None:
    rows = json.loads((book / "_build" / "results" / "results.json").read_text())
    assert {row["claim"] for row in rows} == set(CLAIMS)
    for claim in CLAIMS:
        for untrained in (False, True):
            own = [r for r in rows if (r["claim"], r["untrained"]) == (claim, untrained)]
            assert own
            assert {row["model"] for row in own} == {"tiny-llama"}
            assert {row["verdict"] for row in own} <= set(VERDICTS)
    card = prose(book, "book/intro")
    assert "no result" not in card and "chapter to come" not in card
    for words in re.findall(r"on held-out tasks alone: ([\w ]+?) (?:not|supported)", card):
        assert not words.startswith("supported")


@pytest.mark.parametrize("page", pages(), ids=lambda page: Path(page).name)
def test_no_gap_in_the_computation_stands_in_the_text(book: Path, page: str) -> None:
    text = prose(book, page)
    found = [text[max(0, gap.start() - 60) : gap.end() + 40] for gap in GAP.finditer(text)]
    assert found == []


def test_figures_without_anything_to_draw_say_so_and_gaps_are_named(book: Path) -> None:
    chapter = prose(book, "book/phase-transition")
    assert "Not defined, since states coincide: intrinsic dimension (TwoNN), at " in chapter
    assert "No task is testable" in chapter
