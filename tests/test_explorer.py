"""The depth explorer: its data are what the library computes, its page needs nothing else."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from scipy.stats import spearmanr

from lib.engine import store
from lib.engine.catalogue import catalogue
from lib.engine.models import Decoder, load_decoder
from lib.evidence import records
from lib.evidence.tasks import build_task
from lib.evidence.transfer import Trial, choose_pairs, measure_transfer, read_tasks
from lib.reading import explorer
from lib.reading.explorer import (
    N_SHOWN,
    N_TOP,
    TWIN,
    Exploration,
    depth_positions,
    explore_tasks,
    explore_trial,
    keep_explorations,
    recorded_explorations,
    top_predictions,
)
from lib.reading.explorer_page import SIZE, explorer_html
from lib.science.geometry import distances

N_BLOCKS = 4


N_SUBJECTS = 12


@pytest.fixture(scope="module")
def trial() -> Trial:
    """A task of two templates on a tiny random model."""
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    subjects = [f"w{20 + k}" for k in range(N_SUBJECTS)]
    answers = [f"w{8 + k % 3}" for k in range(N_SUBJECTS)]
    items = pd.DataFrame({"subject": subjects, "answer": answers}).assign(group="")
    task = build_task("toy", items, ["w11 w12 {subject} w13", "w14 {subject} w15 w16"], decoder)
    found = read_tasks(decoder, {"toy": task})["toy"]
    assert isinstance(found, Trial)
    return found


@pytest.fixture(scope="module")
def twin(trial: Trial) -> Decoder:
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer(), untrained=True)


@pytest.fixture(scope="module")
def one(trial: Trial, twin: Decoder) -> Exploration:
    return explore_trial(trial, twin)


def estimates(one: Exploration, name: str) -> np.ndarray:
    rows = one.curves[one.curves["curve"] == name].sort_values("block")
    assert rows["block"].tolist() == list(range(N_BLOCKS))
    assert (rows["low"] <= rows["high"]).all()
    return rows["estimate"].to_numpy()


def embedded_data(html: str) -> list[dict[str, Any]]:
    return json.loads(re.search(r'application/json">(.*?)</script>', html, re.S)[1])


def last_states(trial: Trial) -> np.ndarray:
    model, blocks = trial.decoder.model, trial.decoder.blocks
    prompts = trial.task.tokens[:N_SUBJECTS]  # of the first template
    every = [oracle.block_states(model, blocks, prompt)[:, -1] for prompt in prompts]
    return torch.stack(every, dim=1).numpy()


def test_predictions_at_the_last_block_are_the_models_own(trial: Trial, one: Exploration) -> None:
    own = oracle.forward(trial.decoder.model, trial.task.tokens[:N_SUBJECTS]).double().softmax(-1)
    best = own.topk(N_TOP)
    assert one.top_tokens[-1].tolist() == best.indices.tolist()
    np.testing.assert_allclose(one.top_probabilities[-1], best.values, atol=1e-5)


def test_predictions_before_it_are_those_of_norm_and_unembedding(
    trial: Trial, one: Exploration
) -> None:
    model = trial.decoder.model
    states = torch.as_tensor(last_states(trial)[1])
    with torch.no_grad():
        own = model.lm_head(model.model.norm(states)).double().softmax(-1)
    np.testing.assert_allclose(one.top_probabilities[1], own.topk(N_TOP).values, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(own.numpy(), one.top_tokens[1], 1),
                               one.top_probabilities[1], atol=1e-5)  # fmt: skip
    assert (np.diff(one.top_probabilities, axis=2) <= 0).all()


def test_arms_are_the_transfer_of_all_pairs_and_are_not_measured_again(
    trial: Trial, twin: Decoder, one: Exploration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store, "STORE", tmp_path)
    pairs = choose_pairs(trial)
    assert set(trial.task.prompts["template"].iloc[pairs.prompts[:, 0]]) == {0, 1}
    for arm, site in (("context arm", "subject"), ("prediction arm", "last")):
        found = measure_transfer(trial, pairs, site).estimate()  # type: ignore[arg-type]
        np.testing.assert_allclose(estimates(one, arm), found.value)  # type: ignore[union-attr]

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(store, "sweep_blocks", refuse)
    again = explore_trial(trial, twin)
    pd.testing.assert_frame_equal(again.curves, one.curves)


def test_correlation_is_that_of_angle_and_divergence(trial: Trial, one: Exploration) -> None:
    logits = oracle.forward(trial.decoder.model, trial.task.tokens[:N_SUBJECTS])
    log_p = logits.double().log_softmax(-1).numpy()
    difference = log_p[:, None] - log_p[None]
    jeffreys = ((np.exp(log_p)[:, None] - np.exp(log_p)[None]) * difference).sum(-1)
    upper = np.triu_indices(N_SUBJECTS, 1)
    expected = []
    for states in last_states(trial).astype(np.float64):
        u = states / np.linalg.norm(states, axis=1, keepdims=True)
        angle = np.arccos(np.clip(u @ u.T, -1, 1))
        expected.append(spearmanr(angle[upper], jeffreys[upper]).statistic)
    np.testing.assert_allclose(estimates(one, "angle"), expected, atol=1e-6)
    assert not np.allclose(estimates(one, TWIN), expected, atol=0.01)


def test_directions_that_lie_in_a_plane_keep_their_distances() -> None:
    rng = np.random.default_rng(1)
    flat = rng.uniform(-0.3, 0.3, size=(4, 10, 2))
    heights = np.sqrt(1 - np.square(flat).sum(axis=2, keepdims=True))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    # Unit vectors on a small cap; norms differ and must not matter.
    states = np.concatenate([flat, heights], axis=2) @ turn * rng.uniform(1, 9, size=(4, 10, 1))
    positions, shown = depth_positions(states)
    assert (shown > 0.98).all()
    for block in range(4):
        found, true = distances(positions[block]), distances(flat[block])
        ratio = found[np.triu_indices(10, 1)] / true[np.triu_indices(10, 1)]
        assert ratio.std() / ratio.mean() < 0.05
    assert np.abs(positions).max() == pytest.approx(1)


def test_a_cloud_that_only_turns_stays_where_it_is_on_the_map() -> None:
    rng = np.random.default_rng(2)
    cloud = rng.normal(size=(12, 6))
    states = np.stack([cloud @ np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(5)])
    positions, _ = depth_positions(states)
    for block in range(4):
        np.testing.assert_allclose(positions[block], positions[-1], atol=1e-9)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (np.zeros((1, 4, 3)), "item 0 has norm 0"),
        (np.ones((1, 2, 3)), "at least 3"),
    ],
)
def test_states_without_a_map_are_refused(states: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth_positions(states)


def test_states_that_are_all_alike_lie_at_one_place_shown_whole() -> None:
    positions, shown = depth_positions(np.ones((2, 4, 3)))
    assert not positions.any()
    assert shown.tolist() == [1.0, 1.0]


def test_map_is_that_of_the_states(trial: Trial, one: Exploration) -> None:
    positions, shown = depth_positions(last_states(trial))
    np.testing.assert_allclose(one.positions, positions, atol=1e-4)
    np.testing.assert_allclose(one.shown, shown, atol=1e-4)
    assert list(one.texts) == trial.task.prompts["text"].tolist()[:N_SUBJECTS]


def test_answers_are_the_prompts_own(trial: Trial, one: Exploration) -> None:
    expected = trial.task.prompts["answer"].tolist()[:N_SUBJECTS]
    assert list(one.answers) == [one.words[token] for token in one.right_tokens] == expected


def test_page_holds_what_was_computed(one: Exploration) -> None:
    (data,) = embedded_data(explorer_html([one]))
    for item in range(12):
        for block in range(N_BLOCKS):
            cut = slice(block * N_TOP, (block + 1) * N_TOP)
            words = [data["words"][k] for k in data["top"][item][cut]]
            assert words == [one.words[token] for token in one.top_tokens[block, item]]
            share = np.array(data["permille"][item][cut]) / 1000
            np.testing.assert_allclose(share, one.top_probabilities[block, item], atol=5.01e-4)
    assert [data["words"][k] for k in data["answers"]] == [one.words[t] for t in one.right_tokens]
    at = np.array(data["at"]).reshape(N_BLOCKS, 12, 2)
    positions = one.positions.reshape(-1, 2)
    assert np.corrcoef(at[..., 0].ravel(), positions[:, 0])[0, 1] > 0.999
    assert np.corrcoef(at[..., 1].ravel(), positions[:, 1])[0, 1] < -0.999
    assert at.min() >= 0 and at.max() <= SIZE
    names = ["context arm", "prediction arm", "angle", TWIN]
    assert [curve["name"] for curve in data["curves"]] == names
    for curve in data["curves"]:
        values = estimates(one, curve["name"])
        read = [float(text.replace("\N{MINUS SIGN}", "-")) for text in curve["value"]]
        np.testing.assert_allclose(read, values, atol=0.00501)
        if np.ptp(values):  # Higher is further up, to scale.
            assert np.corrcoef(curve["y"], values)[0, 1] < -0.999


def test_drawn_line_passes_through_the_marks_of_every_block(one: Exploration) -> None:
    html = explorer_html([one])
    (data,) = embedded_data(html)
    lines = re.findall(r'<polyline class="line \w+" points="([^"]+)"', html)
    for line, curve in zip(lines, data["curves"], strict=True):
        points = [tuple(map(float, point.split(","))) for point in line.split()]
        assert points == list(zip(data["x"], curve["y"], strict=True))


def test_page_fetches_nothing_and_is_small(one: Exploration) -> None:
    html = explorer_html([one, one])
    assert not re.search(r"https?:|src=|href=|@import|url\(|<link", html)
    assert not re.search(r"\[\[[A-Z]", html)
    assert len(html.encode()) < 300_000


def test_full_size_stays_below_the_limit() -> None:
    """Three tasks of the book on the embedded model's depth, tokens all over."""
    rng = np.random.default_rng(0)
    big = example(N_SHOWN, 30, tokens=rng.integers(0, 2000, (30, N_SHOWN, N_TOP)))
    assert len(explorer_html([big] * 3).encode()) < 300_000


def test_recorded_models_are_offered_in_the_catalogues_order() -> None:
    labels = [weights.label for weights in catalogue().values()]
    offered = list(dict.fromkeys(one.model for one in recorded_explorations(but=labels[0])))
    assert offered == [one for one in labels[1:] if one in offered] and len(offered) > 2


def test_a_model_that_is_recorded_is_shown_as_it_was_found(
    one: Exploration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RUNS", "RECORDED"):
        monkeypatch.setattr(records, name, tmp_path / name)
    monkeypatch.setattr(explorer, "RECORDED", tmp_path / "RECORDED")
    other = replace(example(n_blocks=7), model="other")
    keep_explorations([one, other])
    for model in (one.model, "other"):
        records.write_atomically(records.run_folder(model) / "run.json", "{}")
        records.record_run(model, [])
    (found,) = recorded_explorations(but="other")
    for name, value in vars(one).items():
        again = getattr(found, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(again, value, atol=1e-4)
        elif isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(
                again, value.reset_index(drop=True), atol=1e-4, check_dtype=False
            )
        else:
            assert again == value
    html = explorer_html([found, other])
    options = re.findall(r'<optgroup label="(.*?)"><option value="(\d)">', html)
    assert options == [(one.model, "0"), ("other", "1")] * 2
    assert [len(part["x"]) for part in embedded_data(html)] == [N_BLOCKS, 7]
    assert "<optgroup" not in explorer_html([one, one])
    page = Controls()
    page.feed(html)
    assert page.named[0] == ("select", "Show")
    assert page.named[1][1].startswith("Beside") and len(page.named) == 5
    assert html.count(">nothing</option>") == 1 and html.count("<optgroup") == 4
    assert [part["title"] for part in embedded_data(html)] == [
        f"{one.model}, {one.name}",
        "other, word",
    ]


def example(
    n_items: int = 6, n_blocks: int = 5, tokens: np.ndarray | None = None, word: str = "word"
) -> Exploration:
    names = ("context arm", "prediction arm", "angle", TWIN)
    curves = pd.DataFrame(
        [(name, block, 0.5, 0.4, 0.6) for name in names for block in range(n_blocks)],
        columns=["curve", "block", "estimate", "low", "high"],
    )
    tokens = np.zeros((n_blocks, n_items, N_TOP), int) if tokens is None else tokens
    return Exploration(
        model="toy",
        texts=[f"{word} {k}" for k in range(n_items)],
        name=word,
        positions=np.random.default_rng(0).uniform(-1, 1, (n_blocks, n_items, 2)),
        shown=np.full(n_blocks, 0.5),
        transition=2.5,
        curves=curves,
        top_tokens=tokens,
        top_probabilities=np.full(tokens.shape, 0.2),
        answers=[f"{word} {k % 5}" for k in range(n_items)],
        right_tokens=np.zeros(n_items, int),
        words={int(token): f"{word} {token}" for token in {0, *tokens.ravel().tolist()}},
    )


@pytest.mark.parametrize("nasty", ["</script><b>", "<!--<script>", '"><img onerror=x>', "a&lt;b"])
def test_token_or_prompt_cannot_break_the_page(nasty: str) -> None:
    html = explorer_html([example(word=nasty)])
    plain = explorer_html([example()])
    assert html.count("<") == plain.count("<") and html.count(">") - plain.count(">") <= 2 * 4
    assert html.count("</script>") == plain.count("</script>") == 2
    (data,) = embedded_data(html)
    assert data["words"] == [f"{nasty} 0"]  # shown as it is, through textContent
    assert "innerHTML" not in html


class Controls(HTMLParser):
    """Collects the controls of a page and which of them stand in a label with words."""

    def __init__(self) -> None:
        super().__init__()
        self.named: list[tuple[str, str]] = []
        self.label: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "label":
            self.label = ""
        if tag in ("input", "select"):
            self.named.append((tag, (self.label or "").strip()))

    def handle_data(self, data: str) -> None:
        if self.label is not None:
            self.label += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "label":
            self.label = None


def test_every_control_has_a_name_and_works_from_the_keyboard(one: Exploration) -> None:
    html = explorer_html([replace(one, transition=1.5), one])
    page = Controls()
    page.feed(html)
    assert page.named == [
        ("select", "Show"),
        ("input", page.named[1][1]),
        ("select", "Prompt"),
        ("select", "Prompt"),
    ]
    assert page.named[1][1].startswith("Block")
    assert f'<input type="range" min="0" max="{N_BLOCKS - 1}" step="1" value="2">' in html
    assert re.search(r'<button type="button" aria-pressed="false">Play', html)
    assert all(re.findall(r'role="img" aria-label="[^"]{20,}"', html))
    assert html.count("<svg") == html.count('role="img"') == 6
    assert "aria-valuetext" in html and "prefers-reduced-motion" in html


def test_twin_that_does_not_tell_prompts_apart_is_left_out(trial: Trial, one: Exploration) -> None:
    alone = replace(one, curves=one.curves[one.curves["curve"] != TWIN])
    (data,) = embedded_data(explorer_html([alone]))
    assert [curve["name"] for curve in data["curves"]] == ["context arm", "prediction arm", "angle"]


def test_what_does_not_fit_together_is_refused(one: Exploration) -> None:
    with pytest.raises(ValueError, match="context arm needs one value at each block"):
        explorer_html([replace(one, curves=one.curves[one.curves["block"] != 2])])
    with pytest.raises(ValueError, match="differ in length"):
        explorer_html([replace(one, positions=one.positions[:, :3])])


def test_model_without_a_testable_task_gets_a_page_that_says_so(
    trial: Trial, twin: Decoder
) -> None:
    assert explore_tasks(trial.decoder, twin, ["capitals", "animals"]) == []
    assert "No task is testable" in explorer_html([])


def test_blanks_in_tokens_are_visible(trial: Trial) -> None:
    tokens, probabilities = top_predictions(trial.decoder, torch.randn(2, 3, 32))
    assert tokens.shape == probabilities.shape == (2, 3, N_TOP)
    from lib.reading.explorer import _word

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return [" a b", "\n", "\u00a0", ""][ids[0]]

    blank = replace(trial.decoder, tokenizer=Tokenizer())
    assert [_word(blank, k) for k in range(4)] == ["␣a␣b", "⏎", "U+00A0", "token 3"]
