"""Sweeps: equal to a full recompute with hooks, for every architecture, arm and batch."""

from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import WithoutFloat64, count_tokens, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lib.engine import replay, sweeps
from lib.engine.batches import plant_prompts
from lib.engine.edits import (
    Edit,
    Rotate,
    Scale,
    add,
    exchange,
    exchange_direction,
    exchange_norm,
)
from lib.engine.extraction import extract_residuals, logit_lens
from lib.engine.models import Decoder, load_decoder
from lib.engine.replay import Forest, Prefix, run_forest
from lib.engine.sweeps import Measure, Request, Sweep, sweep_blocks, sweep_together

KEEP = Scale(1.0)  # changes nothing
PROMPTS = [
    [5, 9, 4, 33, 12, 8, 51],
    [5, 9, 17, 20, 6, 44, 9],
    [5, 9, 12, 40, 2, 9, 30],
    [11, 30, 22, 7, 35],
    [11, 30, 60, 19, 5],
]  # those of one length begin alike, and share what they begin with
PAIRS = np.array([[0, 1], [0, 3], [1, 2], [2, 0], [3, 0], [3, 4], [4, 1], [1, 4]])
READ = [4, 40, 9]
EDITS = {
    "exchange": exchange,
    "direction": exchange_direction,
    "norm": exchange_norm,
    "add": add,
    "keep": KEEP,
}


def by_full_recompute(
    decoder: Decoder,
    positions: list[list[int]],
    edits: dict = EDITS,
    pairs: np.ndarray = PAIRS,
    prompts: list[list[int]] = PROMPTS,
) -> Tensor:
    """Return `[n_edits, n_blocks, n_pairs, d_vocab]` from one pass per edit, block and pair."""
    states = [
        oracle.block_states(decoder.model, decoder.blocks, prompt)[:, where]
        for prompt, where in zip(prompts, positions, strict=True)
    ]
    results = []
    for edit in edits.values():
        for index, block in enumerate(decoder.blocks):
            new = [edit(states[r][index], states[d][index]) for r, d in pairs.tolist()]
            chosen = [prompts[r] for r in pairs[:, 0]]
            where = [positions[r] for r in pairs[:, 0]]
            logits = torch.empty(len(pairs), decoder.d_vocab)
            for length in {len(prompt) for prompt in chosen}:  # so that nothing is padded
                rows = [row for row, prompt in enumerate(chosen) if len(prompt) == length]
                logits[rows] = oracle.patched_logits(
                    decoder.model,
                    block,
                    *([part[row] for row in rows] for part in (chosen, where, new)),
                )
            results.append(logits)
    return torch.stack(results).view(len(edits), decoder.n_blocks, len(pairs), -1)


def full(decoder: Decoder, positions: object, **options: object) -> tuple[Sweep, np.ndarray]:
    """Return a sweep and its full logits."""
    read = list(range(decoder.d_vocab))
    sweep = sweep_blocks(
        decoder, PROMPTS, PAIRS, EDITS, positions=positions, read_ids=read, **options
    )  # type: ignore[arg-type]
    return sweep, sweep.logits


def test_prediction_arm_equals_full_recompute(decoder: Decoder) -> None:
    expected = by_full_recompute(decoder, [[len(prompt) - 1] for prompt in PROMPTS])
    _sweep, logits = full(decoder, "last")
    assert np.abs(logits - expected.numpy()).max() < 1e-4
    assert (logits.argmax(-1) == expected.numpy().argmax(-1)).all()


def test_context_arm_equals_full_recompute(decoder: Decoder) -> None:
    positions = [3, 2, 3, 2, 1]
    expected = by_full_recompute(decoder, [[position] for position in positions])
    _, logits = full(decoder, positions)
    assert np.abs(logits - expected.numpy()).max() < 1e-4


def wordings(rng: np.random.Generator, n: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts of three wordings, of unequal lengths, and two positions in each."""
    begins = [rng.integers(1, 64, size=size).tolist() for size in (3, 6, 11)]
    ends = [rng.integers(1, 64, size=size).tolist() for size in (2, 4, 2)]
    prompts, positions = [], []
    for one in rng.integers(3, size=n):
        subject = rng.integers(1, 64, size=rng.integers(1, 5)).tolist()
        prompts.append(begins[one] + subject + ends[one])
        positions.append([len(begins[one]) + len(subject) - 1, len(prompts[-1]) - 1])
    return prompts, positions


@pytest.mark.parametrize("batch_tokens", [150, 1024])
@pytest.mark.parametrize("column", [0, 1, slice(None)])
def test_many_ragged_prompts_of_few_wordings_equal_full_recompute(
    llama: Decoder, batch_tokens: int, column: int | slice
) -> None:
    """On several lines and in several batches, donors on other lines than their recipients."""
    rng = np.random.default_rng(8)
    prompts, positions = wordings(rng, 60)
    pairs = np.stack([rng.permutation(60), rng.permutation(60)], axis=1)
    where = np.array(positions)[:, column]
    edits = {"exchange": exchange, "add": add}
    read = list(range(llama.d_vocab))
    sweep = sweep_blocks(
        llama, prompts, pairs, edits, positions=where, read_ids=read, batch_tokens=batch_tokens
    )
    own = where.reshape(60, -1).tolist()
    expected = by_full_recompute(llama, own, edits, pairs, prompts)
    assert sweep.path == "prefix replay"
    assert np.abs(sweep.logits - expected.numpy()).max() < 1e-4


def test_longer_prompts_and_longer_rows_are_compared_anew(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first on more tokens than were asked for, so that few lengths are compared."""
    asked: list[tuple[int, int]] = []
    recompute = sweeps.recompute_rows

    def watched(decoder: Decoder, prefix: Prefix, blocks: list[int], rows: Tensor) -> Tensor:
        asked.append((prefix.tokens.shape[1], prefix.row_length))
        return recompute(decoder, prefix, blocks, rows)

    monkeypatch.setattr(sweeps, "recompute_rows", watched)
    monkeypatch.setattr(sweeps, "_planted", type(sweeps._planted)())
    for length, position in ((9, 5), (12, 11), (30, 14), (30, 10), (31, 12), (33, 32), (60, 30)):
        prompts = np.arange(2 * length).reshape(2, length) % 60 + 1
        sweep_blocks(llama, prompts, np.array([[0, 1]]), {"keep": KEEP}, positions=[position] * 2)
    assert asked == [(32, 16), (32, 20), (64, 32)]


def test_what_does_not_hold_on_more_tokens_is_compared_on_the_prompts_own(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a window or a table of positions ends between the two."""
    asked: list[int] = []
    run = sweeps.replay_rows

    def short(decoder: Decoder, prefix: Prefix, blocks: list[int], rows: Tensor) -> Tensor:
        asked.append(prefix.tokens.shape[1])
        found = run(decoder, prefix, blocks, rows)
        return found if prefix.tokens.shape[1] < 15 else found + 1

    monkeypatch.setattr(sweeps, "replay_rows", short)
    monkeypatch.setattr(sweeps, "_planted", type(sweeps._planted)())
    monkeypatch.setattr(sweeps, "_by_themselves", type(sweeps._by_themselves)())
    paths = {}
    for length in (9, 12, 20):
        prompts = np.arange(2 * length).reshape(2, length) + 1
        sweep = sweep_blocks(llama, prompts, np.array([[0, 1]]), {"keep": KEEP}, positions="last")
        paths[length] = sweep.path
    assert paths == {9: "prefix replay", 12: "prefix replay", 20: "full recompute"}
    assert asked == [32, 9, 9, 12, 12, 20, 32, 20]


def test_a_model_of_few_positions_is_compared_within_them() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=12, n_embd=32, n_layer=4, n_head=4)
    small = load_decoder(GPT2LMHeadModel(config).eval(), tokenizer=tiny_tokenizer())
    prompts = np.arange(20).reshape(2, 10) + 1
    for positions in ("last", [4, 5]):
        sweep = sweep_blocks(
            small, prompts, np.array([[0, 1]]), {"keep": KEEP}, positions=positions
        )
        assert sweep.path == "prefix replay"


def test_several_positions_at_once_equal_full_recompute(decoder: Decoder) -> None:
    positions = [[2, 4], [3, 5], [1, 4], [1, 3], [2, 3]]
    expected = by_full_recompute(decoder, positions)
    _, logits = full(decoder, np.array(positions))
    assert np.abs(logits - expected.numpy()).max() < 1e-4


def test_sweep_equals_left_padded_ragged_batch(llama: Decoder) -> None:
    states = extract_residuals(llama, PROMPTS).states
    _, logits = full(llama, "last")
    for index, block in enumerate(llama.blocks):
        recipients = [PROMPTS[r] for r in PAIRS[:, 0]]
        new = [states[index, [d]] for d in PAIRS[:, 1]]
        expected = oracle.patched_logits(llama.model, block, recipients, [[-1]] * len(new), new)
        assert np.abs(logits[0, index] - expected.numpy()).max() < 1e-4


EXPECTED_PATHS = dict.fromkeys(
    ["bloom", "mamba", "bamba", "granitemoehybrid", "minimax"], "full recompute"
)


def test_architectures_use_the_fast_path_but_where_it_cannot_be_exact(decoder: Decoder) -> None:
    sweep, _ = full(decoder, "last")
    assert sweep.path == EXPECTED_PATHS.get(decoder.model.config.model_type, "prefix replay")


def test_self_donor_changes_no_logit(decoder: Decoder) -> None:
    same = np.array([[i, i] for i in range(len(PROMPTS))])
    for positions in ("last", [3, 2, 3, 2, 1]):
        sweep = sweep_blocks(
            decoder, PROMPTS, same, {"exchange": exchange}, positions=positions, read_ids=READ
        )
        assert np.abs(sweep.logits - sweep.clean_logits).max() < 1e-5 * max(
            1.0, np.abs(sweep.clean_logits).max()
        )


def test_edits_in_one_call_equal_edits_alone(llama: Decoder) -> None:
    together, _ = full(llama, "last")
    for index, (name, edit) in enumerate(EDITS.items()):
        alone = sweep_blocks(
            llama, PROMPTS, PAIRS, {name: edit}, positions="last", read_ids=list(range(64))
        )
        assert np.abs(alone.logits[0] - together.logits[index]).max() < 1e-5


def test_result_does_not_depend_on_the_batch(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, large = full(llama, [3, 2, 3, 2, 1])
    monkeypatch.setattr("lib.engine.sweeps.MAX_ROW_TOKENS", 6)
    _, small = full(llama, [3, 2, 3, 2, 1], batch_tokens=1)
    assert np.abs(large - small).max() < 1e-4


class Confidence:
    """A measure of its own for each request: log p of one token, and the pair's number."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        return {"log_p": logits.log_softmax(-1)[:, self.token], "pair": pair.double()}


@pytest.mark.parametrize("given", [False, True])
def test_requests_run_together_equal_each_alone(llama: Decoder, given: bool) -> None:
    requests = [
        Request(PROMPTS[:3], np.array([[0, 1], [2, 0]]), [2, 3, 2], None, [4, 40], Confidence(3)),
        Request(PROMPTS[2:], np.array([[2, 0], [1, 2], [0, 1]]), "last", None, [9], Confidence(7)),
        Request(PROMPTS[:2], np.array([[1, 0]]), [[2, 3], [4, 6]], None, [], Confidence(1)),
        # Of the second one's lengths, so that rows of both lie in turn.
        Request(PROMPTS[1:4], np.array([[0, 1], [2, 0]]), "last", None, [9], Confidence(5)),
    ]
    if given:
        width = [1, 1, 2, 1]
        requests = [
            replace(one, donors=torch.randn(2, len(one.prompts), k, llama.d_model))
            for one, k in zip(requests, width, strict=True)
        ]
    edits, blocks = {"add": add, "exchange": exchange}, [2, 0]
    together = sweep_together(llama, requests, edits, blocks=blocks)
    for one, found in zip(requests, together, strict=True):
        alone = sweep_blocks(
            llama,
            one.prompts,
            one.pairs,
            edits,
            positions=one.positions,
            donors=one.donors,
            blocks=blocks,
            read_ids=one.read_ids,
            measure=one.measure,
        )
        assert np.array_equal(found.pairs, alone.pairs)
        assert found.logits.shape == alone.logits.shape
        assert np.allclose(found.logits, alone.logits, atol=1e-4)
        assert np.allclose(found.clean_logits, alone.clean_logits, atol=1e-4)
        assert np.array_equal(found.measures["pair"], alone.measures["pair"])
        assert np.allclose(found.measures["log_p"], alone.measures["log_p"], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"donors": torch.zeros(4, 3, 32)}, "Request 0 has no donors, and request 1 has"),
        ({"measure": Confidence(3)}, "Request 0 has no measure, and request 1 has"),
    ],
)
def test_requests_that_cannot_run_together_are_named(
    llama: Decoder, change: dict, words: str
) -> None:
    one = Request(PROMPTS[:3], np.array([[0, 1]]), "last")
    with pytest.raises(ValueError, match=words):
        sweep_together(llama, [one, replace(one, **change)], {"keep": KEEP})


def test_prompts_share_passes_across_requests(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    run = replay.run_forest
    monkeypatch.setattr(
        replay, "run_forest", lambda *given: passes.append(len(given[1].rows)) or run(*given)
    )
    own = Request(PROMPTS[:3], np.array([[0, 1], [1, 2], [2, 0]]), "last")
    sweep_blocks(llama, own.prompts, own.pairs, {"keep": KEEP}, positions="last")
    passes.clear()
    sweep_together(llama, [own] * 4, {"keep": KEEP}, blocks=[1])
    assert passes == [12]


def test_a_prompt_that_gives_and_receives_is_run_once(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(llama, "last")  # compares, once
    passes = count_tokens(llama, monkeypatch)
    full(llama, "last")
    # Every beginning once, whatever the lengths. Edited rows call the blocks, not the model.
    beginnings = {tuple(prompt[:n]) for prompt in PROMPTS for n in range(1, len(prompt) + 1)}
    assert passes == [len(beginnings)]


def test_donors_need_not_be_recipients(llama: Decoder) -> None:
    pairs = np.array([[0, 2], [0, 4], [1, 0], [1, 3]])
    read = list(range(llama.d_vocab))
    sweep = sweep_blocks(llama, PROMPTS, pairs, EDITS, positions=[3, 2, 3, 2, 1], read_ids=read)
    expected = by_full_recompute(llama, [[3], [2], [3], [2], [1]], pairs=pairs)
    assert np.abs(sweep.logits - expected.numpy()).max() < 1e-4


def test_donors_that_receive_nothing_give_the_states_of_all_positions(llama: Decoder) -> None:
    prompts = PROMPTS[::-1]  # the shorter ones first
    pairs = np.array([[1, 0], [4, 3], [2, 3], [2, 0]])
    where = [[1, 3], [2, 4], [3, 6], [1, 2], [4, 5]]
    read = list(range(llama.d_vocab))
    sweep = sweep_blocks(llama, prompts, pairs, EDITS, positions=np.array(where), read_ids=read)
    expected = by_full_recompute(llama, where, pairs=pairs, prompts=prompts)
    assert np.abs(sweep.logits - expected.numpy()).max() < 1e-4


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A decoder whose replays lose the edit."""

    def unedited(_decoder: Decoder, prefix: Prefix, blocks: list[int], _rows: Tensor) -> Tensor:
        return prefix.states[-1][:, None, -1].expand(-1, len(blocks), -1)

    monkeypatch.setattr("lib.engine.sweeps.replay_rows", unedited)
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())


def test_a_replay_that_loses_the_edit_is_noticed_and_not_used(losing: Decoder) -> None:
    sweep, logits = full(losing, "last")
    assert sweep.path == "full recompute"
    expected = by_full_recompute(losing, [[len(prompt) - 1] for prompt in PROMPTS])
    assert np.abs(logits - expected.numpy()).max() < 1e-4


def test_prefixes_beyond_the_memory_kept_for_them_are_run_again(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = full(llama, "last", batch_tokens=1)
    passes = count_tokens(llama, monkeypatch)
    full(llama, "last", batch_tokens=1)
    once = sum(passes)
    monkeypatch.setattr("lib.engine.replay.KEPT_BYTES", 0)
    passes.clear()
    _, after = full(llama, "last", batch_tokens=1)
    assert sum(passes) == 2 * once
    assert np.array_equal(before, after)


def test_a_sweep_is_as_near_to_float64_as_a_full_recompute(embedded: Decoder) -> None:
    rng = np.random.default_rng(3)
    prompts = rng.integers(20, embedded.d_vocab, size=(4, 8)).tolist()
    pairs, block = np.array([[0, 1], [1, 2], [2, 3], [3, 0]]), 4
    read = list(range(embedded.d_vocab))
    sweep = sweep_blocks(
        embedded, prompts, pairs, {"exchange": exchange}, positions=[3] * 4, blocks=[block],
        read_ids=read,
    )  # fmt: skip
    assert sweep.path == "prefix replay"

    def recomputed(decoder: Decoder) -> np.ndarray:
        part = decoder.blocks[block]
        states = [oracle.block_states(decoder.model, [part], prompt)[0, 3] for prompt in prompts]
        chosen, donors = pairs.T
        new = [states[donor] for donor in donors]
        rows = [prompts[recipient] for recipient in chosen]
        return oracle.patched_logits(decoder.model, part, rows, [3] * 4, new).double().numpy()

    truth = recomputed(load_decoder(dtype="float64"))
    ours, theirs = sweep.logits[0, 0] - truth, recomputed(embedded) - truth
    assert 0 < np.abs(ours).max() < 1e-3
    assert np.sqrt(np.square(ours).mean()) < 1.5 * np.sqrt(np.square(theirs).mean())


def test_two_runs_are_bit_identical(llama: Decoder) -> None:
    assert np.array_equal(full(llama, "last")[1], full(llama, "last")[1])


def test_measure_sees_every_row_once_with_its_pair(llama: Decoder) -> None:
    def measure(logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        return {"normaliser": logits.logsumexp(-1), "pair": pair.float()}

    sweep = sweep_blocks(
        llama, PROMPTS, PAIRS, EDITS, positions="last", read_ids=READ, measure=measure
    )
    _, logits = full(llama, "last")
    reference = torch.tensor(logits).logsumexp(-1).numpy()
    assert np.abs(sweep.measures["normaliser"] - reference).max() < 1e-4
    assert (sweep.measures["pair"] == np.arange(len(PAIRS))).all()
    assert np.abs(sweep.logits - logits[..., READ]).max() < 1e-5


def test_donors_given_replace_the_prompts_own_states(llama: Decoder) -> None:
    donors = torch.randn(2, 3, llama.d_model)
    pairs = np.array([[0, 2], [4, 1]])
    sweep = sweep_blocks(
        llama, PROMPTS, pairs, {"x": exchange}, positions="last", donors=donors, blocks=[2, 0],
        read_ids=list(range(64)),
    )  # fmt: skip
    assert sweep.path == "prefix replay"
    for column, block in enumerate([2, 0]):
        for row, (recipient, donor) in enumerate(pairs.tolist()):
            expected = oracle.patched_logits(
                llama.model,
                llama.blocks[block],
                [PROMPTS[recipient]],
                [[-1]],
                [donors[column, [donor]]],
            )
            assert np.abs(sweep.logits[0, column, row] - expected[0].numpy()).max() < 1e-4


def test_edit_at_an_early_block_reaches_the_logits_only_through_later_blocks(
    llama: Decoder,
) -> None:
    sweep = sweep_blocks(
        llama, PROMPTS, PAIRS, {"exchange": exchange}, positions=[3, 2, 3, 2, 1], read_ids=READ
    )
    last = np.abs(sweep.logits[0, -1] - sweep.clean_logits).max()
    early = np.abs(sweep.logits[0, 0] - sweep.clean_logits).max()
    assert last < 1e-5 and early > 1e-2  # nothing reads an earlier token after the last block


def test_sweep_leaves_the_model_as_it_was(llama: Decoder) -> None:
    before = oracle.forward(llama.model, PROMPTS[:3])
    n_hooks = [len(block._forward_hooks) for block in llama.blocks]
    full(llama, "last")
    with pytest.raises(ZeroDivisionError):
        sweep_blocks(
            llama, PROMPTS, PAIRS, {"x": lambda *_: 1 / 0}, positions="last", read_ids=READ
        )
    assert torch.equal(oracle.forward(llama.model, PROMPTS[:3]), before)
    assert [len(block._forward_hooks) for block in llama.blocks] == n_hooks


def test_frame_has_one_row_per_edit_block_and_pair(llama: Decoder) -> None:
    sweep = sweep_blocks(llama, PROMPTS, PAIRS, EDITS, positions="last", read_ids=READ)
    frame = sweep.to_frame()
    assert len(frame) == len(EDITS) * llama.n_blocks * len(PAIRS)
    row = frame[
        (frame.edit == "add") & (frame.block == 2) & (frame.recipient == 3) & (frame.donor == 4)
    ]
    assert row.choice.item() == sweep.logits[3, 2, 5].argmax()


@pytest.mark.parametrize(
    ("pairs", "options", "words"),
    [
        (np.array([[0, 5]]), {}, "donors up to 5"),
        (np.array([0, 1]), {}, r"shape \[n_pairs, 2\]"),
        (PAIRS, {"positions": [0, 1, 1, 1, 1]}, "Prompt 0 would be edited at position 0"),
        (PAIRS, {"positions": [1, 1, 1, 5, 1]}, "Prompt 3 has 5 tokens; position 5"),
        (PAIRS, {"blocks": [7]}, "Block 7 does not exist"),
        (PAIRS, {"donors": torch.zeros(4, 5, 31)}, "expected"),
        (PAIRS, {"donors": torch.zeros(32)}, "expected"),
        (PAIRS.astype(float), {}, "Pairs are indices of prompts, whole numbers; got float64"),
        (PAIRS, {"positions": 2}, "1 positions for 5 prompts"),
        (PAIRS, {"blocks": []}, "No edits were given, or no blocks"),
        (PAIRS, {"edits": {}}, "No edits were given"),
        (PAIRS, {"read_ids": [64]}, "Token 64 cannot be read: .* scores tokens 0 to 63"),
        (PAIRS, {"read_ids": [-1]}, "Token -1 cannot be read"),
    ],
)
def test_bad_input_is_named_before_any_pass(
    llama: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    pairs: np.ndarray,
    options: dict,
    words: str,
) -> None:
    options = {"edits": EDITS, "positions": "last", "read_ids": READ, **options}
    passes = count_tokens(llama, monkeypatch)
    with pytest.raises(ValueError, match=words):
        sweep_blocks(llama, PROMPTS, pairs, **options)
    assert passes == []


def test_arrays_may_be_read_backwards_and_donors_be_arrays(llama: Decoder) -> None:
    donors = torch.randn(4, 5, llama.d_model, generator=torch.Generator().manual_seed(1))
    plain = {"pairs": PAIRS, "donors": donors, "read_ids": READ}
    back = {
        "pairs": PAIRS[:, ::-1].copy()[:, ::-1],
        "donors": donors.numpy()[::-1].copy()[::-1],
        "read_ids": np.array(READ)[::-1].copy()[::-1],
    }
    one, other = (
        sweep_blocks(llama, PROMPTS, edits=EDITS, positions="last", **given)
        for given in (plain, back)
    )
    assert np.array_equal(one.logits, other.logits)
    request = Request(PROMPTS, back["pairs"], "last", back["donors"], back["read_ids"])
    (together,) = sweep_together(llama, [request], EDITS)
    assert np.allclose(one.logits, together.logits, atol=1e-5)


def sizes(*names: str) -> Measure:
    return lambda logits, _: {name: logits.amax(-1) for name in names}


@pytest.mark.parametrize("positions", ["last", [[2, 3], [2, 3], [2, 3]]])
def test_measures_of_other_names_are_refused_whether_or_not_they_share_a_pass(
    llama: Decoder, positions: Any
) -> None:
    one = Request(PROMPTS[:3], np.array([[0, 1]]), "last", measure=sizes("a", "b"))
    other = replace(one, positions=positions, measure=sizes("b"))
    with pytest.raises(ValueError, match=r"one set of names; got \[.*'b'\], and before \[.*'b'\]"):
        sweep_together(llama, [other, one], {"keep": KEEP})


def test_a_measure_that_changes_its_names_is_refused(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count()

    def fickle(logits: Tensor, _: Tensor) -> dict[str, Tensor]:
        return {str(next(calls)): logits.amax(-1)}

    monkeypatch.setattr(sweeps, "UNEMBEDDING_ROWS", 4)
    with pytest.raises(ValueError, match=r"one set of names; got \['1'\], and before \['0'\]"):
        sweep_blocks(llama, PROMPTS, PAIRS, EDITS, positions="last", measure=fickle)


def test_one_number_for_all_rows_of_a_request_is_refused(llama: Decoder) -> None:
    one = Request(
        PROMPTS, PAIRS, "last", measure=lambda logits, _: {"size": logits.amax().reshape(1)}
    )
    with pytest.raises(ValueError, match=r"Measure 'size' is \(1,\); expected a tensor"):
        sweep_together(llama, [one], EDITS)


def broken(token: int) -> Decoder:
    """Return a model of which one token's embedding is damaged."""
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight[token, 3] = torch.nan  # type: ignore[index]
    return decoder


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (False, {}, r"^State of prompt 3 after block 0: not finite, .*; load the model in another"),
        (True, {"read_ids": READ}, "^Unedited logits of prompt 3: not finite"),
        (
            True,
            {"measure": lambda logits, _: {"choice": logits.argmax(-1).double()}},
            r"^Last state of edit 'exchange' after block 0, pair 0 \(recipient 3, donor 3\): not f",
        ),
    ],
)
def test_what_a_damaged_model_puts_out_is_refused_with_what_it_was_of(
    given: bool, options: dict, words: str
) -> None:
    donors = torch.ones(2, 5, 32) if given else None
    with pytest.raises(ValueError, match=words):
        sweep_blocks(
            broken(22), PROMPTS, np.array([[3, 3]]), {"exchange": exchange}, positions="last",
            blocks=[0, 2], donors=donors, **options,
        )  # fmt: skip


def test_edited_logits_that_overflow_are_refused_with_edit_block_and_pair(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lens(decoder: Decoder, states: Tensor, ids: list[int]) -> Tensor:
        large = states.norm(dim=-1, keepdim=True) > 1e6
        return logit_lens(decoder, states, ids).masked_fill(large, torch.inf)

    monkeypatch.setattr(sweeps, "logit_lens", lens)
    donors = torch.ones(1, 5, llama.d_model)
    donors[0, 4] = 1e7
    with pytest.raises(
        ValueError,
        match=r"^Logits of edit 'exchange' after block 3, pair 5 \(recipient 3, donor 4\)",
    ):
        sweep_blocks(
            llama, PROMPTS, PAIRS, {"exchange": exchange}, positions="last", blocks=[3],
            donors=donors, read_ids=READ,
        )  # fmt: skip


def test_measures_need_no_float64_where_they_are(llama: Decoder) -> None:
    def measure(logits: Tensor, _: Tensor) -> dict[str, Tensor]:
        return {"size": logits.amax(-1).clone().as_subclass(WithoutFloat64)}

    one = Request(PROMPTS, PAIRS, "last", measure=measure)
    (found,) = sweep_together(llama, [one], EDITS)
    alone = sweep_blocks(llama, PROMPTS, PAIRS, EDITS, positions="last", measure=measure)
    assert np.allclose(found.measures["size"], alone.measures["size"], atol=1e-5)


def test_replay_is_used_for_a_sliding_window_shorter_than_the_prompt() -> None:
    decoder = load_decoder(tiny_model("mistral"), tokenizer=tiny_tokenizer())
    assert decoder.model.config.sliding_window < len(PROMPTS[0])
    assert full(decoder, "last")[0].path == "prefix replay"


def spoil(at: int, value: float) -> Edit:
    """Return an edit that is right but for one pair's states, which hold `value`."""

    def edit(state: Tensor, donor: Tensor) -> Tensor:
        return torch.where((donor == at).all(-1, keepdim=True), torch.tensor(value), donor)

    return edit


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_edit_that_returns_no_number_is_named_with_block_and_pair(
    llama: Decoder, value: float
) -> None:
    donors = torch.randn(4, 5, 1, llama.d_model, generator=torch.Generator().manual_seed(1))
    donors[2, 0] = 7.0  # donor 0 at block 2, which pairs 3 and 4 take
    with pytest.raises(
        ValueError,
        match=r"^Edit 'bad' after block 2 returned NaN or infinity for pair [34] \(recipient "
        r"[23], donor 0\); an edit returns finite states\.$",
    ):
        sweep_blocks(
            llama, PROMPTS, PAIRS, {"exchange": exchange, "bad": spoil(7, value)},
            positions="last", donors=donors, read_ids=READ,
        )  # fmt: skip


def test_an_edit_that_returns_another_dtype_is_named(llama: Decoder) -> None:
    for edit, words in (
        (lambda state, donor: donor.double(), r"dtype torch\.float64 for pair \d+ \(recipient"),
        (lambda state, donor: donor[..., :3], r"returned shape .* an edit keeps the shape"),
        (Rotate(30.0), r"^Edit 'bad' after block 0: State \d+ and its target are parallel"),
    ):
        same = np.array([[i, i] for i in range(5)])
        with pytest.raises(ValueError, match=words):
            sweep_blocks(llama, PROMPTS, same, {"bad": edit}, positions="last", read_ids=READ)


def test_a_measure_that_gives_no_number_is_named_with_edit_block_and_pair(llama: Decoder) -> None:
    def nothing(logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        return {"size": torch.where(pair == 5, torch.nan, logits.amax(-1))}

    def shapeless(logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        return {"size": logits}

    def untyped(logits: Tensor, pair: Tensor) -> dict[str, Tensor]:
        return {"size": logits.amax(-1).tolist()}  # type: ignore[dict-item]

    for measure, words in (
        (nothing, r"^Measure 'size' is nan for edit '\w+' after block 0, pair 5 \(recipient 3, d"),
        (shapeless, r"^Measure 'size' is \(\d+, 64\); expected a tensor \(\d+,\), one number a r"),
        (untyped, r"^Measure 'size' is list; expected a tensor"),
    ):
        with pytest.raises(ValueError, match=words):
            sweep_blocks(llama, PROMPTS, PAIRS, EDITS, positions="last", measure=measure)


def test_whether_replay_is_exact_is_found_with_an_edit_that_shows_it(losing: Decoder) -> None:
    """Not with the caller's own, which may change nothing."""
    kept = sweep_blocks(losing, PROMPTS, PAIRS, {"keep": KEEP}, positions="last", read_ids=READ)
    assert kept.path == "full recompute"


@pytest.mark.parametrize("architecture", ["mpt", "bloom", "falcon_h1"])
def test_a_sweep_of_the_last_block_vouches_for_no_other(architecture: str) -> None:
    """After the last block nothing is replayed, so that any way would be exact there."""
    decoder = load_decoder(tiny_model(architecture), tokenizer=tiny_tokenizer())
    pairs, edits = np.array([[0, 1], [3, 4]]), {"exchange": exchange}
    read = list(range(decoder.d_vocab))
    for blocks in ([decoder.n_blocks - 1], None):
        sweep = sweep_blocks(
            decoder, PROMPTS, pairs, edits, positions=[2] * 5, blocks=blocks, read_ids=read
        )
    expected = by_full_recompute(decoder, [[2]] * 5, edits, pairs)
    assert np.abs(sweep.logits - expected.numpy()).max() < 1e-4


def test_what_was_exact_under_one_hook_is_not_taken_for_exact_under_another() -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    pairs, edits, read = np.array([[0, 1], [3, 4]]), {"exchange": exchange}, list(range(64))

    def at_the_last(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + 1], dim=1)

    for hook in (lambda *_: None, at_the_last):
        # In a part of a block, where it is as much in force as on the block itself.
        handle = decoder.blocks[2].mlp.register_forward_hook(hook)
        sweep = sweep_blocks(decoder, PROMPTS, pairs, edits, positions=[2] * 5, read_ids=read)
        expected = by_full_recompute(decoder, [[2]] * 5, edits, pairs)
        handle.remove()
        assert sweep.path == "full recompute"
        assert np.abs(sweep.logits - expected.numpy()).max() < 1e-4


def test_a_window_shorter_than_a_line_but_not_than_a_prompt_changes_nothing() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 24
    decoder = load_decoder(model, tokenizer=tiny_tokenizer())
    rng = np.random.default_rng(9)
    prompts = rng.integers(1, 64, size=(30, 12)).tolist()
    pairs = np.stack([np.arange(30), np.roll(np.arange(30), 1)], axis=1)
    read = list(range(decoder.d_vocab))
    edits = {"exchange": exchange}
    sweep = sweep_blocks(decoder, prompts, pairs, edits, positions="last", read_ids=read)
    expected = by_full_recompute(decoder, [[11]] * 30, edits, pairs, prompts)
    assert np.abs(sweep.logits - expected.numpy()).max() < 1e-4


def test_forests_that_are_given_are_not_run_again_and_the_rest_is_added(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [run_forest(llama, batch) for batch in plant_prompts(PROMPTS[:3], range(3), 1024)]
    _, expected = full(llama, [3, 2, 3, 2, 1])
    passes = count_tokens(llama, monkeypatch)
    rest = {tuple(prompt[:n]) for prompt in PROMPTS[3:] for n in range(1, len(prompt) + 1)}
    for n_run in ([len(rest)], []):
        _, found = full(llama, [3, 2, 3, 2, 1], forests=own)
        assert passes == n_run
        assert np.abs(found - expected).max() < 1e-5
        passes.clear()


def test_beside_forests_that_leave_no_room_a_sweep_still_runs_its_prompts_once(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(llama, "last")
    others = [[9, 8, 7, 6, 5, 4, 3, 2], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]]
    held = [run_forest(llama, batch) for batch in plant_prompts(others, range(3), 1024)]
    (own,) = [run_forest(llama, batch) for batch in plant_prompts(PROMPTS, range(5), 1024)]
    monkeypatch.setattr("lib.engine.replay.KEPT_BYTES", own.n_bytes)
    passes = count_tokens(llama, monkeypatch)
    full(llama, "last", forests=held)
    assert passes == [own.batch.tokens.numel()]
    assert len(held) == 1


def test_of_forests_of_other_prompts_those_that_are_shared_serve(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = full(llama, [3, 2, 3, 2, 1])
    shorter, longer = PROMPTS[0][:-1], [*PROMPTS[4], 3]
    others = [longer, PROMPTS[4], PROMPTS[1], shorter]
    own = [run_forest(llama, batch) for batch in plant_prompts(others, range(4), 1024)]
    passes = count_tokens(llama, monkeypatch)
    _, found = full(llama, [3, 2, 3, 2, 1], forests=own)
    left = [prompt for prompt in PROMPTS if prompt not in others]
    assert passes == [
        len({tuple(prompt[:n]) for prompt in left for n in range(1, len(prompt) + 1)})
    ]
    assert np.abs(found - expected).max() < 1e-5


def test_forests_of_another_model_or_of_other_weights_are_refused() -> None:
    one, other = (load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer()) for _ in range(2))
    forests: list[Forest] = []
    extract_residuals(one, PROMPTS, forests=forests)
    sweep_blocks(one, PROMPTS, PAIRS, EDITS, positions="last", forests=forests)
    with torch.no_grad():
        for decoder in (other, one):
            with pytest.raises(ValueError, match="Forest 0 was run by another model"):
                extract_residuals(decoder, PROMPTS, forests=forests)
            with pytest.raises(ValueError, match="Forest 0 was run by another model"):
                full(decoder, "last", forests=forests)
            next(iter(one.model.parameters())).mul_(1.5)


def test_prompts_of_one_request_are_not_run_again_for_another(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forests: list[Forest] = []
    request = Request(PROMPTS, PAIRS, "last", read_ids=READ)
    (expected,) = sweep_together(llama, [request], {"exchange": exchange}, forests=forests)
    passes = count_tokens(llama, monkeypatch)
    backwards = Request(PROMPTS[::-1], len(PROMPTS) - 1 - PAIRS, "last", read_ids=READ)
    found = sweep_together(llama, [backwards, request], {"exchange": exchange}, forests=forests)
    assert passes == []
    for one in found:
        assert np.abs(one.logits - expected.logits).max() < 1e-5


def twin(seed: int) -> Decoder:
    model = tiny_model("llama")
    return load_decoder(model, tokenizer=tiny_tokenizer(), untrained=True, seed=seed)


def test_one_untrained_twin_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    full(twin(0), "last")
    other = twin(1)
    passes = count_tokens(other, monkeypatch)
    full(other, "last")
    assert len(passes) == 1


class Louder(torch.nn.Linear):
    """A module of another class, as a user may put it into a model."""


@pytest.mark.parametrize("what", ["trained", "another module", "another dtype"])
def test_twins_do_not_speak_for_what_is_built_otherwise(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(twin(0), "last")
    decoder = twin(1)
    if what == "trained":
        decoder = replace(decoder, untrained=False)
    if what == "another module":
        decoder.blocks[0].mlp.down_proj.__class__ = Louder
    if what == "another dtype":
        decoder.model.double()
    passes = count_tokens(decoder, monkeypatch)
    full(decoder, "last")
    assert len(passes) > 1
