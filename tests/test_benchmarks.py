"""Benchmarks: workloads are what they say, the bound counts right, and nothing wrong is timed."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks import chapters, figures, tables, worker
from benchmarks.bound import Shape, minimum_macs
from benchmarks.contenders import HALF, MODULES, base, engine, recompute
from benchmarks.workloads import EDITS, LOADS, ExtractLoad, SweepLoad, ordered, ring, shrink
from lib.engine.models import Decoder

TINY = Shape(n_blocks=2, d_model=3, d_query=4, d_key=2, d_mlp=5, d_vocab=7)
PROMPT_LENGTH = 6
SMALL = SweepLoad("small", 4, PROMPT_LENGTH, ring(4), PROMPT_LENGTH - 1, tuple(EDITS), 4)
EARLY = replace(SMALL, position=3)


# Workloads


@pytest.mark.parametrize(
    ("name", "n_prompts", "length", "n_pairs", "position", "n_edits"),
    [
        ("sweep, T = 8", 32, 8, 32, 7, 1),
        ("sweep, T = 64", 32, 64, 32, 63, 1),
        ("all pairs, T = 64", 12, 64, 132, 63, 1),
        ("many edits, T = 64", 32, 64, 32, 63, 4),
        ("early position, T = 8", 32, 8, 32, 3, 1),
        ("early position, T = 64", 32, 64, 32, 3, 1),
    ],
)
def test_sweeps_have_the_pairs_lengths_and_positions_of_their_names(
    name: str, n_prompts: int, length: int, n_pairs: int, position: int, n_edits: int
) -> None:
    load = LOADS[name]
    assert isinstance(load, SweepLoad)
    prompts = load.prompts(49152)
    assert [len(prompt) for prompt in prompts] == [length] * n_prompts
    assert len({tuple(prompt) for prompt in prompts}) == n_prompts
    assert len(set(load.pairs)) == len(load.pairs) == n_pairs
    assert all(r != d and max(r, d) < n_prompts for r, d in load.pairs)
    assert load.position == position
    assert load.edits == tuple(EDITS)[:n_edits]


def test_extractions_have_the_prompts_of_their_names() -> None:
    equal, ragged = LOADS["extract, equal lengths"], LOADS["extract, ragged"]
    assert isinstance(equal, ExtractLoad) and isinstance(ragged, ExtractLoad)
    assert [len(p) for p in equal.prompts(49152)] == [32] * 256
    lengths = [len(p) for p in ragged.prompts(49152)]
    assert len(lengths) == 2048 and max(lengths) == 64 and len(set(lengths)) > 50


def test_token_ids_are_the_same_in_every_process() -> None:
    for load in LOADS.values():
        prompts = load.prompts(49152)
        assert prompts == load.prompts(49152)
        assert min(map(min, prompts)) >= 20 and max(map(max, prompts)) < 49152


def test_shares_are_spread_evenly_over_the_whole() -> None:
    assert replace(SMALL, n_shared_blocks=5).shared_blocks(30) == (3, 9, 15, 21, 27)
    assert replace(SMALL, n_shared_blocks=9).shared_blocks(4) == (0, 1, 2, 3)
    assert ExtractLoad("x", (3,) * 10, stride=4).shared_prompts().tolist() == [0, 4, 8]


def test_quick_workloads_keep_lengths_positions_and_edits() -> None:
    for load in LOADS.values():
        small = shrink(load)
        if isinstance(load, SweepLoad):
            assert isinstance(small, SweepLoad)
            assert (small.length, small.position, small.edits) == (
                load.length,
                load.position,
                load.edits,
            )
            assert 0 < len(small.pairs) < len(load.pairs)
        else:
            assert set(small.lengths) <= set(load.lengths)
    assert len(shrink(LOADS["all pairs, T = 64"]).pairs) == len(ordered(3))  # type: ignore[union-attr]


# Contenders that need no other library


def logits_of(contender: base.Contender, load: SweepLoad) -> np.ndarray:
    n_blocks, d_vocab = contender.decoder.n_blocks, contender.decoder.d_vocab
    logits = np.full((len(load.edits), n_blocks, len(load.pairs), d_vocab), np.nan)

    def keep(edit: int, block: int, pairs: np.ndarray, values: torch.Tensor) -> None:
        logits[edit, block, pairs] = values.numpy()

    contender.sweep(load, keep, range(n_blocks))
    return logits


@pytest.mark.parametrize("load", [SMALL, EARLY, replace(SMALL, pairs=ordered(4))])
def test_our_call_agrees_with_full_recompute(llama: Decoder, load: SweepLoad) -> None:
    ours = logits_of(engine.make(llama), load)
    largest, same = driver.difference(ours, logits_of(recompute.make(llama), load))
    assert largest < 1e-4
    assert same == 1.0


def test_an_edit_at_another_position_is_refused(llama: Decoder) -> None:
    ours = logits_of(engine.make(llama), EARLY)
    largest, _ = driver.difference(ours, logits_of(recompute.make(llama), SMALL))
    assert largest > driver.TOLERANCE


def test_missing_logits_are_refused(llama: Decoder) -> None:
    ours = logits_of(engine.make(llama), SMALL)
    spoiled = ours.copy()
    spoiled[0, 1, 2, 3] = np.nan
    assert driver.difference(spoiled, ours)[0] == float("inf")
    assert driver.difference(ours[:, :2], ours)[0] == float("inf")


def test_batches_change_no_logit_of_the_full_recompute(llama: Decoder) -> None:
    contender = recompute.FullRecompute(llama)
    contender.batch = 3
    few = logits_of(contender, SMALL)
    contender.batch = 128
    assert driver.difference(few, logits_of(contender, SMALL))[0] < 1e-4


def test_ragged_extraction_agrees_prompt_by_prompt(llama: Decoder) -> None:
    load = ExtractLoad("ragged", (7, 3, 5, 4, 7, 6))
    ours = engine.make(llama).extract(load)[2]
    contender = recompute.FullRecompute(llama)
    contender.batch = 4
    assert (contender.extract(load)[2] - ours).abs().max() < 1e-4 * ours.abs().max()
    for index, prompt in enumerate(load.prompts(llama.d_vocab)):
        alone = contender.states(torch.tensor([prompt]), None, len(prompt) - 1)
        assert (alone[:, 0] - ours[:, index]).abs().max() < 1e-4 * ours.abs().max()


def test_a_share_is_scaled_and_what_is_paid_once_is_not() -> None:
    assert base.Timing(fixed=1.0, scaled=2.0, share=0.25).seconds == 9.0


# The driver's checks


def test_a_timed_run_that_went_astray_is_an_error() -> None:
    row = {"contender": "x", "attention": "eager"}
    expected = np.array([[1.0, np.nan, 3.0]])
    driver.compare_digests(np.array([[1.0, 2.0, 3.0]]), expected, row)
    with pytest.raises(RuntimeError, match="astray"):
        driver.compare_digests(np.array([[1.0, 2.0, 3.1]]), expected, row)
    with pytest.raises(RuntimeError, match="astray"):
        driver.compare_digests(np.full((1, 3), np.nan), expected, row)


class Scripted:
    """Stands for a process: answers a check with the array it is given."""

    def __init__(self, logits: np.ndarray | None) -> None:
        self.logits = logits

    def ask(self, do: str, **request: str) -> dict:
        if self.logits is None:
            return {"error": "ImportError: no such library"}
        if do == "check":
            np.save(request["file"], self.logits)
        return {"batch": 8} if do == "tune" else {}


def test_who_differs_or_fails_is_not_timed_and_said_so(tmp_path: Path) -> None:
    truth = np.zeros((1, 2, 3, 5), dtype=np.float32)
    processes = {
        "this book": Scripted(truth + 1e-5),
        "full recompute": Scripted(truth),
        "nnsight": Scripted(truth + 2e-3),
        "pyvene": Scripted(None),
    }
    results: dict = {"refused": []}
    rows = driver.admit(processes, {"load": "x", "quick": False}, str(tmp_path), results)  # type: ignore[arg-type]
    assert {row["contender"] for row in rows} == {"this book", "full recompute"}
    reasons = {row["contender"]: row["reason"] for row in results["refused"]}
    assert "differs by 2.0e-03" in reasons["nnsight"]
    assert "no such library" in reasons["pyvene"]
    processes["this book"] = Scripted(truth + 1.0)
    with pytest.raises(RuntimeError, match="this book: differs"):
        driver.admit(processes, {"load": "x", "quick": False}, str(tmp_path), results)  # type: ignore[arg-type]


def test_worker_answers_an_error_and_goes_on(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker, "load_decoder", lambda **_options: llama)
    monkeypatch.setitem(worker.LOADS, "small", SMALL)
    file = str(tmp_path / "answer.npy")
    requests = [
        {"do": "run", "load": "small", "quick": False, "attention": "no such", "file": file},
        {"do": "check", "load": "small", "quick": False, "attention": "eager", "file": file},
    ]
    answers: list[dict] = []
    before = llama.model.config._attn_implementation
    lines = io.StringIO("".join(json.dumps(request) + "\n" for request in requests))
    worker.serve("this book", lines, answers.append)
    llama.model.set_attn_implementation(before)
    assert answers[0]["shape"]["n_blocks"] == llama.n_blocks
    assert "error" in answers[1] and answers[2] == {}
    assert np.load(file).shape == (4, 4, 4, llama.d_vocab)


# The arithmetic bound


def test_bound_of_an_extraction_by_hand() -> None:
    # Block 0, two tokens: queries 2·12, keys and values 2·12, output and MLP 2·(12 + 45), attention
    # 2·4·(1 + 2). Block 1: keys and values of both, the rest of the last token, which sees 2 keys.
    assert minimum_macs(TINY, ExtractLoad("x", (2,))) == (24 + 24 + 114 + 24) + (24 + 12 + 57 + 16)


def test_bound_of_a_sweep_by_hand() -> None:
    # Two prompts once; then for each of 2 pairs and 1 edit: from block 0 one token through block 1
    # (12 + 12 + 57, 2·4·2 for attention) and the unembedding (21), from block 1 the unembedding.
    load = SweepLoad("x", 2, 2, ring(2), 1)
    once = 2 * minimum_macs(TINY, ExtractLoad("x", (2,)))
    assert minimum_macs(TINY, load) == once + 2 * ((12 + 12 + 57 + 16 + 21) + 21)


def test_bound_of_an_early_edit_by_hand() -> None:
    # Three tokens, the second edited, one pair. The prompt: block 0 for 3 tokens (3·(12 + 12 + 57)
    # and 8·(1 + 2 + 3)), block 1 for keys and values of 2 and the rest of one that sees 2 keys;
    # the donor: 2 tokens. The row after block 0: in block 1 keys and values of the edited token
    # alone, the last token's output and MLP, its query being what it was; 3 keys; unembedding.
    load = SweepLoad("x", 2, 3, ((0, 1),), 1)
    recipient = (3 * 81 + 8 * 6) + (24 + 12 + 57 + 16)
    donor = (2 * 81 + 8 * 3) + (24 + 12 + 57 + 16)
    assert minimum_macs(TINY, load) == recipient + donor + (12 + 57 + 24 + 21)


def test_bound_counts_the_weights_of_a_real_model(llama: Decoder) -> None:
    shape = Shape.of(llama.model.config)
    linear = [m for m in llama.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    n_weights = sum(module.weight.numel() for module in linear)
    assert shape.queries + shape.keys_values + shape.rest == n_weights
    assert shape.d_model * shape.d_vocab == llama.unembedding.weight.numel()


# The table


def results() -> dict:
    common = {"workload": "w", "logit_difference": 1e-5, "same_choice": 1.0, "share": 1.0}
    common |= {"batch": 8, "peak_mib": 900.0, "macs": 10_000_000_000}
    seconds = {
        ("this book", "eager"): [2.0, 3.0, 2.5],
        ("this book", "sdpa"): [1.0, 2.0, 1.0],
        ("nnsight", "eager"): [9.0, 9.0, 9.0],
        ("nnsight", "sdpa"): [8.0, 8.0, 8.0],
    }
    rows = [
        {**common, "contender": contender, "attention": attention, "seconds": values}
        for (contender, attention), values in seconds.items()
    ]
    return {
        "rows": rows,
        "rates_gmacs": [90.0, 100.0, 110.0],
        "refused": [],
        "quick": False,
        "runs": 3,
        "model": "a model",
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 2, "system": "Linux"},
        "versions": {"torch": "2.13.0"},
    }


def test_an_unfinished_run_is_resumed_if_it_was_made_alike(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    fresh = {**results(), "finished": False, "rows": [], "rates_gmacs": []}
    assert driver.resumed(file, fresh) is fresh
    begun = {**results(), "finished": False}
    file.write_text(json.dumps(begun))
    assert driver.resumed(file, fresh) == begun
    for other in ({"finished": True}, {"versions": {"torch": "2.12.0"}}, {"runs": 5}):
        file.write_text(json.dumps({**begun, **other}))
        assert driver.resumed(file, fresh) is fresh


def test_table_has_medians_of_ratios_to_our_faster_row() -> None:
    table = tables.comparison(results()).set_index(["contender", "attention"])
    assert table.loc[("this book", "sdpa"), "ratio"] == 1.0
    assert table.loc[("this book", "eager"), "ratio"] == 2.0  # median of 2, 1.5 and 2.5
    assert table.loc[("nnsight", "sdpa"), "ratio"] == 8.0  # median of 8, 4 and 8
    assert table.loc[("nnsight", "eager"), "seconds"] == 9.0
    assert table.loc[("this book", "sdpa"), "bound"] == pytest.approx(0.1)  # 10 G at 100 G/s in 1 s


def test_best_peer_is_the_fastest_row_that_is_not_ours() -> None:
    best = tables.best_peers(tables.comparison(results()))
    assert best[["contender", "attention"]].to_numpy().tolist() == [["nnsight", "sdpa"]]
    assert best["ratio"].item() == 8.0 and best["ours_bound"].item() == pytest.approx(0.1)


def test_page_s_table_has_a_row_for_each_contender_and_attention() -> None:
    shown = tables.shown(tables.comparison(results()))
    assert len(shown) == 4
    assert shown.iloc[3]["ratio to ours"] == "8.00"
    assert shown.iloc[1]["share of the bound"] == "10%"


def test_summary_sets_our_faster_row_beside_the_fastest_library() -> None:
    recorded = results()
    recompute = {**recorded["rows"][2], "contender": "full recompute", "seconds": [3.0, 3.0, 3.0]}
    table = tables.comparison({**recorded, "rows": [*recorded["rows"], recompute]})
    (row,) = tables.summary(table).to_dict("records")
    assert row["seconds"] == "1.00" and row["share of the bound"] == "10%"
    assert row["full recompute, by ours"] == "3.00"
    assert row["fastest library, by ours"] == "8.00 (nnsight)"
    assert len(tables.summary(tables.comparison(None))) == 0


def test_half_precision_is_set_beside_fp32_and_is_no_contender(tmp_path: Path) -> None:
    assert HALF not in MODULES
    halved = {"workload": "w", "logit_difference": 0.5, "same_choice": 0.9, "seconds": [1, 1, 1]}
    recorded = results()
    halved["workload"] = recorded["rows"][0]["workload"]
    (row,) = tables.half_precision({**recorded, "half": [halved]}).to_dict("records")
    assert row["speed-up"] == "1.00" and row["same argmax"] == "90.0%"
    assert len(tables.half_precision(recorded)) == len(tables.half_precision(None)) == 0
    truth = np.zeros((1, 2, 3, 5), dtype=np.float32)
    np.save(tmp_path / "reference.npy", truth)
    found = driver.compare_half(Scripted(truth + 0.25), {"load": "x"}, str(tmp_path))  # type: ignore[arg-type]
    assert found["logit_difference"] == 0.25 and found["same_choice"] == 1.0
    with pytest.raises(RuntimeError, match="no such library"):
        driver.compare_half(Scripted(None), {"load": "x"}, str(tmp_path))  # type: ignore[arg-type]


def test_figure_draws_each_contender_s_fastest_row() -> None:
    figure = figures.ratio_figure(tables.comparison(results()))
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert drawn["nnsight"] == [8.0]


def test_page_says_so_where_nothing_is_recorded(tmp_path: Path) -> None:
    nothing = tables.read_results(tmp_path / "none.json")
    assert nothing is None
    assert "make bench" in tables.made_on(nothing)
    assert tables.finding(nothing) == "Nothing is recorded yet."
    assert len(tables.shown(tables.comparison(nothing))) == 0
    assert not figures.ratio_figure(tables.comparison(nothing)).axes[0].lines[1:]


def test_page_says_where_the_numbers_come_from_and_who_was_left_out() -> None:
    assert "Made on A CPU, 2 cores, 2 threads, Linux; torch 2.13.0" in tables.made_on(results())
    assert "Small workloads" not in tables.made_on(results())
    assert "Small workloads" in tables.made_on({**results(), "quick": True})
    assert "takes 8.0 to 8.0 times as long" in tables.finding(results())
    refused = [{"workload": "w", "contender": "x", "attention": "sdpa", "reason": "differs"}]
    assert "x (sdpa) on “w”: differs" in tables.left_out({**results(), "refused": refused})


def test_recorded_results_are_whole_and_name_no_machine() -> None:
    recorded = tables.read_results()
    assert recorded is not None and not recorded["quick"]
    assert set(pd.DataFrame(recorded["rows"])["workload"]) == set(LOADS)
    assert set(recorded["machine"]) == {"cpu", "cores", "threads", "system"}
    assert tables.RESULTS.stat().st_size < 100_000


# The chapters' time


def test_a_moment_is_what_the_innermost_reason_for_it_is() -> None:
    torch_linear = "/x/site-packages/torch/nn/modules/linear.py"
    kinds = {
        "networks": ["/r/lib/claims/a.py", "/r/lib/engine/sweeps.py", torch_linear],
        "edits, measures, checks": ["/r/lib/claims/a.py", "/r/lib/engine/sweeps.py", "/numpy/x.py"],
        "training": ["/r/lib/engine/small_decoders.py", torch_linear],
        "loading": ["/r/lib/engine/models.py", "/r/lib/engine/loading.py", torch_linear],
        "figures": ["/r/lib/reading/figures.py", "/x/scipy/stats.py"],
        "statistics": ["/r/lib/science/estimate.py", "/numpy/x.py"],
        "rest": ["/python3/threading.py"],
    }
    for kind, files in kinds.items():
        assert chapters.kind_of([f"{file}:run" for file in files]) == kind
    by_columns = ["/r/lib/engine/sweeps.py:_read", "/r/lib/engine/models.py:_map_by_columns"]
    assert chapters.kind_of(by_columns) == "networks"


PAGE = """---
kernelspec: {display_name: Python 3, language: python, name: python3}
---

```{code-cell} ipython3
import time, torch
from lib.engine import models
from lib.engine.files import BUILD
layer, x = torch.nn.Linear(64, 256), torch.randn(3, 1000, 64)
layer(x)  # keeps a gradient: not counted
torch.set_grad_enabled(False)
layer(x), layer(x)
models._map_by_columns(layer, x)  # past the module
models._map_by_columns(type("Own", (torch.nn.Linear,), {})(64, 256), x)  # as a module
kept = BUILD.name
time.sleep(1)
```

```{code-cell} ipython3
assert kept == "kept"
```
"""


def test_a_page_s_work_is_counted_and_its_time_all_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    found = chapters.run(page, tmp_path / "kept")
    assert found["chapter"] == "page"
    assert found["macs"] == 4 * 3 * 1000 * 64 * 256
    assert found["seconds"] == pytest.approx(sum(found["by_kind"].values()))
    assert found["by_kind"]["rest"] > 0.9 and found["rate"] > 1e8
    page.write_text(PAGE.replace('"kept"', '"elsewhere"'))
    with pytest.raises(Exception, match="AssertionError"):
        chapters.run(page, tmp_path / "kept")


def test_table_of_chapters_sums_seconds_and_takes_networks_rate_alone() -> None:
    nothing = dict.fromkeys([*chapters.KINDS, chapters.REST], 0.0)
    rows = [
        {"chapter": "a", "seconds": 10, "macs": 5e9, "rate": 1e9,
         "by_kind": {**nothing, "networks": 8.0, "statistics": 2.0}},
        {"chapter": "b", "seconds": 30, "macs": 0, "rate": 1e9,
         "by_kind": {**nothing, "training": 30.0}},
    ]  # fmt: skip
    table = tables.chapters(rows).set_index("chapter")
    assert list(table["seconds"]) == ["10", "30", "40"]
    assert list(table["networks"]) == ["80%", "0%", "20%"]
    assert list(table["training"]) == ["0%", "100%", "75%"]
    assert list(table["their rate"]) == ["62%", "–", "62%"]
    said = tables.where_time_goes(table.reset_index())
    assert said.startswith("Of 40 seconds of the chapters, 20% pass in networks, at 62% of")
    assert "make profile" in tables.where_time_goes(tables.chapters(None))
