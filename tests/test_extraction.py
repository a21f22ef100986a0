"""Extraction: the right block, the right token, whatever the batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import count_tokens, tiny_model, tiny_tokenizer

from lib.engine import passes as forward_passes
from lib.engine.edits import exchange
from lib.engine.extraction import extract_residuals, logit_lens, tokenize
from lib.engine.generation import generate
from lib.engine.models import Decoder, load_decoder
from lib.engine.replay import Forest
from lib.engine.store import recall_residuals
from lib.engine.sweeps import sweep_blocks
from lib.engine.vectors import unembedding_direction

RAGGED = [[5, 9, 4, 33], [8, 3, 17], [6, 6, 12, 40, 2, 9], [11, 30, 22], [7, 21, 9, 50, 50, 1]]


def test_states_equal_hooks_on_each_prompt_alone(decoder: Decoder) -> None:
    residuals = extract_residuals(decoder, RAGGED, positions=[1, 2, -2, -1, 3])
    for row, (prompt, position) in enumerate(zip(RAGGED, [1, 2, 4, 2, 3], strict=True)):
        expected = oracle.block_states(decoder.model, decoder.blocks, prompt)[:, position]
        # Rounding grows with the states: scans of hybrid models reach a size of ten.
        size = max(1.0, float(expected.abs().max()))
        assert torch.allclose(residuals.states[:, row], expected, rtol=0, atol=1e-5 * size)


def test_states_read_off_what_was_run_before_equal_hooks(decoder: Decoder) -> None:
    forests: list[Forest] = []
    first = extract_residuals(decoder, RAGGED[1:], forests=forests)
    again = extract_residuals(decoder, RAGGED, positions=[1, 2, -2, -1, 3], forests=forests)
    plain = extract_residuals(decoder, RAGGED, positions=[1, 2, -2, -1, 3], logits=True)
    last = extract_residuals(decoder, RAGGED[1:], logits=True, forests=forests)
    size = max(1.0, float(plain.states.abs().max()))
    assert torch.allclose(again.states, plain.states, rtol=0, atol=1e-5 * size)
    assert torch.allclose(first.states, last.states, rtol=0, atol=1e-5 * size)
    assert last.logits is not None and plain.logits is not None
    assert torch.allclose(last.logits, plain.logits[1:], rtol=0, atol=1e-4 * size)


def test_what_was_run_is_not_run_again_for_other_positions_or_edits(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forests: list[Forest] = []
    pairs, edits = np.array([[0, 1], [3, 2]]), {"exchange": exchange}
    extract_residuals(llama, RAGGED, forests=[])  # compares, once, as do sweeps
    sweep_blocks(llama, RAGGED, pairs, edits, positions="last")
    passes = count_tokens(llama, monkeypatch)
    extract_residuals(llama, RAGGED, forests=forests)
    assert passes == [sum(map(len, RAGGED))]
    extract_residuals(llama, RAGGED[::-1], positions=[1, 2, 3, 1, 0], forests=forests)
    sweep_blocks(llama, RAGGED, pairs, edits, positions="last", forests=forests)
    assert len(passes) == 1


@pytest.mark.parametrize("what", ["states", "keys"])
def test_where_keeping_keys_changes_the_states_prompts_run_without(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    forward, expected = decoder.model.base_model.forward, extract_residuals(decoder, RAGGED).states

    def other(input_ids: torch.Tensor, **options: Any) -> object:
        if options.get("use_cache"):
            if what == "keys":
                options.pop("past_key_values")
            input_ids = input_ids.flip(-1)
        return forward(input_ids, **options)

    monkeypatch.setattr(decoder.model.base_model, "forward", other)
    forests: list[Forest] = []
    assert torch.allclose(extract_residuals(decoder, RAGGED, forests=forests).states, expected)
    assert forests == []


def test_last_block_is_read_before_the_final_norm(llama: Decoder) -> None:
    residuals = extract_residuals(llama, [[5, 9, 4]])
    with torch.no_grad():
        normed = llama.model(torch.tensor([[5, 9, 4]]), output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(residuals.states[-1, 0], normed[0, -1], atol=1e-2)
    assert torch.allclose(llama.final_norm(residuals.states[-1, 0]), normed[0, -1], atol=1e-4)


def test_logits_equal_a_left_padded_batch(decoder: Decoder) -> None:
    if decoder.model.config.model_type in ("gpt_neox", "opt", "bloom", "gpt2"):
        prompts = [prompt for prompt in RAGGED if len(prompt) == 6]
    else:
        prompts = RAGGED
    logits = extract_residuals(decoder, prompts, blocks=(), logits=True).logits
    assert logits is not None
    assert torch.allclose(logits, oracle.forward(decoder.model, prompts), atol=1e-4)


def test_result_does_not_depend_on_the_batch(llama: Decoder) -> None:
    whole = extract_residuals(llama, RAGGED, logits=True)
    single = extract_residuals(llama, RAGGED, logits=True, batch_tokens=1)
    assert whole.logits is not None and single.logits is not None
    assert torch.allclose(whole.states, single.states, atol=1e-5)
    assert torch.allclose(whole.logits, single.logits, atol=1e-4)


BEGIN_ALIKE = [[5, 9, 3, 7, 11, end, 4] for end in (12, 13, 14)] + [[5, 9, 3, 7, 11, 12, 6]]


def test_prompts_that_begin_alike_equal_each_prompt_alone(decoder: Decoder) -> None:
    for positions in ("last", [2, 4, 5, 6]):
        found = extract_residuals(decoder, BEGIN_ALIKE, positions=positions).states
        where = [6] * 4 if isinstance(positions, str) else positions
        for row, prompt in enumerate(BEGIN_ALIKE):
            expected = oracle.block_states(decoder.model, decoder.blocks, prompt)[:, where[row]]
            assert torch.allclose(found[:, row], expected, atol=1e-4, rtol=1e-4)


def test_a_shared_beginning_is_run_once(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    extract_residuals(llama, BEGIN_ALIKE)  # compares, once
    passes = count_tokens(llama, monkeypatch)
    extract_residuals(llama, BEGIN_ALIKE)
    assert passes == [5 + 3 * 2 + 1]  # three ends of two tokens, and another last token


def test_where_sharing_is_not_exact_every_prompt_runs_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    inputs_of = forward_passes.inputs_of

    def blurred(*given: object) -> dict[str, torch.Tensor]:
        inputs = inputs_of(*given)  # type: ignore[arg-type]
        return {name: value * (name != "attention_mask") for name, value in inputs.items()}

    monkeypatch.setattr(forward_passes, "inputs_of", blurred)
    passes = count_tokens(decoder, monkeypatch)
    extract_residuals(decoder, BEGIN_ALIKE)
    assert passes[-1] == 4 * 7
    for row, prompt in enumerate(BEGIN_ALIKE):
        expected = oracle.block_states(decoder.model, decoder.blocks, prompt)[:, -1]
        found = extract_residuals(decoder, BEGIN_ALIKE).states[:, row]
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_under_a_users_hook_prompts_run_as_they_are(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = llama.blocks[1].register_forward_hook(lambda *_: None)
    passes = count_tokens(llama, monkeypatch)
    extract_residuals(llama, BEGIN_ALIKE)
    handle.remove()
    assert passes == [4 * 7]
    llama.model(torch.tensor([[5, 9]]), output_hidden_states=True)  # leaves hooks of its own
    extract_residuals(llama, BEGIN_ALIKE)
    assert passes[-1] == 12


def test_an_attention_sink_hides_no_difference_of_other_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight[3] *= 1e6
    forward = decoder.model.base_model.forward

    def unplaced(input_ids: torch.Tensor, **options: object) -> object:
        options.pop("position_ids", None)
        return forward(input_ids, **options)

    monkeypatch.setattr(decoder.model.base_model, "forward", unplaced)
    prompts = [[3, 4, 5, 6, 7], [3, 9, 10, 11, 12], [3, 4, 5, 6, 8]]
    found = extract_residuals(decoder, prompts).states
    for row, prompt in enumerate(prompts):
        expected = oracle.block_states(decoder.model, decoder.blocks, prompt)[:, -1]
        assert torch.allclose(found[:, row], expected, atol=1e-4)


def test_prompts_of_few_lengths_run_side_by_side(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_residuals(llama, RAGGED)  # compares, once
    passes = count_tokens(llama, monkeypatch)
    extract_residuals(llama, RAGGED)
    assert passes == [sum(map(len, RAGGED))]


def test_prompts_that_begin_alike_still_share_among_prompts_of_other_lengths(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*BEGIN_ALIKE, *RAGGED]
    extract_residuals(llama, prompts)
    passes = count_tokens(llama, monkeypatch)
    extract_residuals(llama, prompts)
    assert passes == [len({tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)})]


def test_logits_are_those_of_the_last_token_whatever_the_positions(llama: Decoder) -> None:
    whole = extract_residuals(llama, RAGGED, logits=True).logits
    early = extract_residuals(llama, RAGGED, positions=[0, 1, 2, 0, 3], logits=True).logits
    assert whole is not None and early is not None
    assert torch.allclose(whole, early, atol=1e-5)


@pytest.mark.parametrize("lines_told_apart", [0, 1])
def test_where_forests_are_not_exact_each_length_runs_by_itself(
    monkeypatch: pytest.MonkeyPatch, lines_told_apart: int
) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    forward = decoder.model.base_model.forward

    def blind(input_ids: torch.Tensor, **options: object) -> object:
        if len(input_ids) > lines_told_apart:
            options.pop("attention_mask", None)  # every token sees all before it on its line
        return forward(input_ids, **options)

    monkeypatch.setattr(decoder.model.base_model, "forward", blind)
    found = extract_residuals(decoder, RAGGED * 6).states  # several lines
    monkeypatch.undo()
    for row, prompt in enumerate(RAGGED * 6):
        expected = oracle.block_states(decoder.model, decoder.blocks, prompt)[:, -1]
        assert torch.allclose(found[:, row], expected, atol=1e-5)


def test_a_first_line_that_holds_one_prompt_does_not_vouch_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    forward = decoder.model.base_model.forward

    def blind(input_ids: torch.Tensor, **options: object) -> object:
        options.pop("attention_mask", None)
        return forward(input_ids, **options)

    monkeypatch.setattr(decoder.model.base_model, "forward", blind)
    prompts = [list(range(1, 33)) * 2, *RAGGED]
    found = extract_residuals(decoder, prompts, batch_tokens=64).states
    monkeypatch.undo()
    for row, prompt in enumerate(prompts):
        expected = oracle.block_states(decoder.model, decoder.blocks, prompt)[:, -1]
        assert torch.allclose(found[:, row], expected, atol=1e-5)


def test_with_another_attention_everything_is_compared_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    passes = count_tokens(decoder, monkeypatch)
    counts = []
    for attention in ("sdpa", "eager", "sdpa"):
        decoder.model.set_attn_implementation(attention)
        before = len(passes)
        extract_residuals(decoder, RAGGED)
        extract_residuals(decoder, BEGIN_ALIKE)
        counts.append(len(passes) - before)
    assert counts[0] == counts[1] > counts[2] == 2


def test_ten_thousand_prompts_need_little_memory_beyond_their_states() -> None:
    script = """
import resource
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import tiny_model, tiny_tokenizer
from lib.engine.extraction import extract_residuals
from lib.engine.models import load_decoder

decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
prompts = np.random.default_rng(0).integers(3, 64, size=(10_000, 60)).tolist()
extract_residuals(decoder, prompts[:1_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
states = extract_residuals(decoder, prompts).states
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, states.nbytes // 1024)
"""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=here.parent,
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
        capture_output=True,
        text=True,
    )
    grown, result = map(int, done.stdout.split())  # KiB
    assert grown < result + 64 * 1024  # all of the prompts' states at all positions: 300 MiB


def test_chosen_blocks_come_in_the_order_asked_for(llama: Decoder) -> None:
    every = extract_residuals(llama, RAGGED).states
    some = extract_residuals(llama, RAGGED, blocks=[3, 1])
    assert some.blocks == (3, 1)
    assert torch.allclose(some.states, every[[3, 1]], atol=1e-6)


def test_lens_at_the_last_block_is_the_models_output(decoder: Decoder) -> None:
    residuals = extract_residuals(decoder, RAGGED, logits=True)
    assert residuals.logits is not None
    assert torch.allclose(logit_lens(decoder, residuals.states[-1]), residuals.logits, atol=1e-4)


def test_no_hook_stays_behind_after_an_exception(llama: Decoder) -> None:
    before = [len(block._forward_hooks) for block in llama.blocks]
    failing = llama.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract_residuals(llama, [[5, 9, 10]])
    failing.remove()
    assert [len(block._forward_hooks) for block in llama.blocks] == before


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([[5, 9, 4], [8, 3, 17]]),
        np.array([[5, 9, 4], [8, 3, 17]], dtype=np.int32),
        [torch.tensor([5, 9, 4]), np.array([8, 3, 17])],
        [[np.int64(5), torch.tensor(9), 4], (8, 3, 17)],
    ],
)
def test_token_ids_may_be_tensors_or_arrays(llama: Decoder, prompts: Any) -> None:
    plain = [[5, 9, 4], [8, 3, 17]]
    pairs, edits = np.array([[0, 1]]), {"exchange": exchange}

    def measure(given: Any) -> list[Any]:
        read = extract_residuals(llama, given, positions=[1, -1], logits=True)
        sweep = sweep_blocks(llama, given, pairs, edits, positions="last", read_ids=[3, 4])
        recalled = recall_residuals(llama, given)
        assert read.logits is not None
        return [read.states, read.logits, torch.tensor(sweep.logits), recalled.states,
                torch.tensor(generate(llama, given, 3))]  # fmt: skip

    for found, expected in zip(measure(prompts), measure(plain), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["w5 w9"], "turn texts into them by tokenize"),
        ({"input_ids": [[5, 9]]}, "turn texts into them by tokenize"),
        ([[5, 9], [5.0, 9.0]], r"Prompt 1 is no list of token ids; its first entry is 5\.0"),
        (torch.tensor([[0.5, 1.5]]), "Prompt 0 is no list of token ids"),
        ([[5, 9], [63, 63]], r"Prompt 1 is padding alone \(token 63\)"),
        ([[63, 5, 9], [5, 9]], r"Prompt 0 is padded \(token 63\)"),
        ([[5, 9], [5, 9, 63]], "Prompt 1 is padded"),
    ],
)
def test_prompts_that_are_no_token_ids_are_refused(prompts: Any, words: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "w63"
    decoder = load_decoder(tiny_model("llama"), tokenizer=tokenizer)
    for call in (extract_residuals, recall_residuals):
        with pytest.raises(ValueError, match=words) as raised:
            call(decoder, prompts)
        assert "\n" not in str(raised.value)


def test_tokenize_returns_plain_lists(llama: Decoder) -> None:
    assert tokenize(llama, ["w3 w4", "w5"]) == [[3, 4], [5]]


@pytest.mark.parametrize("texts", ["w1 w2", [], [5], [["w1"]]])
def test_what_is_no_list_of_texts_is_refused(llama: Decoder, texts: Any) -> None:
    with pytest.raises(ValueError, match=r"Texts are a list of strings, .*, \[text\]"):
        tokenize(llama, texts)


@pytest.mark.parametrize("token_ids", [[3, 64], [-1, 3], np.array([3, 99])])
def test_tokens_that_the_model_does_not_score_are_refused(llama: Decoder, token_ids: Any) -> None:
    states = torch.ones(2, llama.d_model)
    for call, *given in (
        (logit_lens, token_ids),
        (unembedding_direction, token_ids, [5, 6]),
        (unembedding_direction, [5, 6], token_ids),
    ):
        with pytest.raises(ValueError, match=r"^Token (64|-1|99) cannot be read: .* 0 to 63\.$"):
            call(llama, states, *given)
    with pytest.raises(ValueError, match=r"^Token ids are whole numbers, got \[1\.0\]"):
        logit_lens(llama, states, [1.0])  # type: ignore[list-item]


def test_the_lens_reads_tokens_backwards_and_none(llama: Decoder) -> None:
    states, ids = torch.randn(2, llama.d_model), np.array([3, 9, 4])
    lens = logit_lens(llama, states)
    assert torch.allclose(logit_lens(llama, states, ids[::-1]), lens[:, [4, 9, 3]], atol=1e-5)
    assert logit_lens(llama, states, []).shape == (2, 0)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("embedding", "^State of prompt 2 after block 1: not finite, .*; load the model in"),
        ("unembedding", "^Logits of prompt 0: not finite"),
    ],
)
def test_results_that_are_not_finite_are_refused_with_their_prompt(part: str, words: str) -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())
    damaged = decoder.unembedding if part == "unembedding" else decoder.model.get_input_embeddings()
    with torch.no_grad():
        damaged.weight[40, 3] = torch.nan
    with pytest.raises(ValueError, match=words):
        extract_residuals(decoder, RAGGED, blocks=[1, 3], logits=True)


@pytest.mark.parametrize(
    ("prompts", "positions", "blocks", "words"),
    [
        ([], "last", None, "No prompts"),
        ([[5], []], "last", None, "Prompt 1 is empty"),
        ([[5, 6]], [2], None, "position 2 does not exist"),
        ([[5, 6]], [0, 1], None, "2 positions for 1 prompts"),
        ([[5, 6]], [1.0], None, r"Positions are whole numbers, got \[1\.0\]"),
        ([[5, 6]], "middle", None, "Positions 'middle': give \"last\""),
        ([[5, 6]], "last", [4], "Block 4 does not exist"),
        ([[5, 6]], "last", [1, 2, 1], "Block 1 is asked for twice"),
        ([[5, 6]], "last", [0.5], r"Blocks are whole numbers, got \[0\.5\]"),
        ([[5, 6]], "last", 1, "Blocks are whole numbers, got 1; give a list"),
        ([[5, 6]], 1, None, "Positions are whole numbers, got 1; give a list"),
        ([1, 2, 3], "last", None, r"Prompt 0 is 1, no list of token ids; give \[prompt\]"),
        (torch.tensor([1, 2, 3]), "last", None, "Prompt 0 is .*1.*, no list of token ids"),
    ],
)
def test_bad_input_is_named(llama: Decoder, prompts, positions, blocks, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        extract_residuals(llama, prompts, positions=positions, blocks=blocks)


def test_embedded_model_predicts_the_next_month(embedded: Decoder) -> None:
    months = ["January", "February", "March", "April", "May", "June"]
    text = [f"January, February, March, April, May, June, {a}," for a in months[:5]]
    ids = np.array([embedded.tokenizer(f" {month}")["input_ids"] for month in months]).ravel()
    logits = extract_residuals(embedded, tokenize(embedded, text), blocks=(), logits=True).logits
    assert logits is not None
    assert logits[:, ids].argmax(-1).tolist() == [1, 2, 3, 4, 5]
