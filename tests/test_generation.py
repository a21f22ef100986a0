"""Steering while the model writes: only where asked, with or without cache, alone or in a batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from oracle import block_states
from torch import Tensor

from lib.engine.edits import Rotate, Scale
from lib.engine.extraction import extract_residuals
from lib.engine.generation import generate, steer
from lib.engine.models import Decoder, load_decoder

PROMPTS = [[5, 9, 12, 33], [7, 21], [40, 8, 3, 17, 25, 30, 11]]
BLOCK, N_NEW = 1, 6
EVERY = 10**6
STATEFUL = ("mamba",)  # padding would enter their state


def target_of(decoder: Decoder) -> Tensor:
    return torch.randn(decoder.d_model, generator=torch.Generator().manual_seed(5))


def logits(decoder: Decoder, prompt: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return decoder.model(torch.tensor([list(prompt)]), use_cache=False).logits[0]


def plain_steered(decoder: Decoder, prompt: Sequence[int], positions: Any, n_new: int) -> list[int]:
    """One prompt, no cache, no lib: each token recomputes the text, edited by position."""
    target, text = target_of(decoder), list(prompt)

    def change(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for place in positions:
            if place < hidden.shape[1]:
                hidden[0, place] = Rotate(120)(hidden[0, place], target)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = decoder.blocks[BLOCK].register_forward_hook(change)
    for _ in range(n_new):
        text.append(int(logits(decoder, text)[-1].argmax()))
    handle.remove()
    return text[len(prompt) :]


@pytest.mark.parametrize("where", ["last of prompt", "generated", "both"])
def test_steered_generation_equals_recomputing_without_a_cache(
    decoder: Decoder, where: str
) -> None:
    decoder.model.generation_config.eos_token_id = None
    one_length = decoder.model.config.model_type in STATEFUL  # others are refused, see below
    prompts = PROMPTS[:1] if one_length else PROMPTS
    positions = [
        {
            "last of prompt": [len(p) - 1],
            "generated": range(len(p), EVERY),
            "both": range(len(p) - 1, EVERY),
        }[where]
        for p in prompts
    ]
    with steer(decoder, BLOCK, Rotate(120), target_of(decoder), positions):
        batched = generate(decoder, prompts, N_NEW)
    with steer(decoder, BLOCK, Rotate(120), target_of(decoder), positions):
        uncached = generate(decoder, prompts, N_NEW, use_cache=False)
    alone = [
        plain_steered(decoder, prompt, [p for p in range(64) if p in chosen], N_NEW)
        for prompt, chosen in zip(prompts, positions, strict=True)
    ]
    assert batched == alone
    assert uncached == alone
    assert batched != generate(decoder, prompts, N_NEW)


def test_batched_prompts_of_different_lengths_equal_single_ones(decoder: Decoder) -> None:
    if decoder.model.config.model_type in STATEFUL:
        with pytest.raises(ValueError, match="carries a state in place of keys and values"):
            generate(decoder, PROMPTS, N_NEW)
        return
    single = [generate(decoder, [prompt], N_NEW)[0] for prompt in PROMPTS]
    assert generate(decoder, PROMPTS, N_NEW) == single


def test_what_a_users_hook_upsets_is_forgotten_with_the_hook() -> None:
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())

    def count_columns(_module: Any, _args: Any, states: Tensor) -> Tensor:
        return states + torch.arange(states.shape[1])[None, :, None]  # padding counts too

    with decoder.blocks[1].register_forward_hook(count_columns):
        assert len(generate(decoder, PROMPTS[:1], N_NEW)) == 1
        with pytest.raises(ValueError, match="padding would enter"):
            generate(decoder, PROMPTS, N_NEW)
    single = [generate(decoder, [prompt], N_NEW)[0] for prompt in PROMPTS]
    assert generate(decoder, PROMPTS, N_NEW) == single


def test_the_last_token_alone_is_unembedded(llama: Decoder) -> None:
    generate(llama, PROMPTS, n_new_tokens=1)  # compares, once
    rows: list[int] = []
    handle = llama.unembedding.register_forward_hook(
        lambda _module, _given, logits: rows.append(logits.shape[:-1].numel())
    )
    try:
        generate(llama, PROMPTS, n_new_tokens=2)
    finally:
        handle.remove()
    assert rows == [len(PROMPTS)] * 2


def test_each_prompt_gets_its_own_donor(llama: Decoder) -> None:
    donors = torch.randn(3, llama.d_model, generator=torch.Generator().manual_seed(8))
    places = [len(prompt) - 1 for prompt in PROMPTS]
    with steer(llama, BLOCK, Rotate(120), donors, places):
        batched = generate(llama, PROMPTS, N_NEW)
    for prompt, donor, place, expected in zip(PROMPTS, donors, places, batched, strict=True):
        with steer(llama, BLOCK, Rotate(120), donor, [place]):
            assert generate(llama, [prompt], N_NEW) == [expected]


def test_the_edit_applies_to_the_positions_asked_for_and_to_no_other(decoder: Decoder) -> None:
    prompt = PROMPTS[2]
    clean = block_states(decoder.model, decoder.blocks, prompt)
    target = target_of(decoder)
    with steer(decoder, BLOCK, Rotate(60), target, [[2, 4]]):
        edited = torch.stack(
            [
                extract_residuals(decoder, [prompt], positions=[p], blocks=[BLOCK]).states[0, 0]
                for p in range(len(prompt))
            ]
        )
    for place in range(len(prompt)):
        state = clean[BLOCK, place]
        expected = Rotate(60)(state, target) if place in (2, 4) else state
        torch.testing.assert_close(edited[place], expected, rtol=1e-5, atol=1e-5)


def test_the_models_own_generate_is_steered_too(llama: Decoder) -> None:
    llama.model.generation_config.eos_token_id = None
    prompt = PROMPTS[0]
    with steer(llama, BLOCK, Rotate(120), target_of(llama), [range(len(prompt), EVERY)]):
        theirs = llama.model.generate(
            torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
    assert theirs == plain_steered(llama, prompt, range(len(prompt), 64), N_NEW)


def test_positions_may_be_arrays(llama: Decoder) -> None:
    target, plain = target_of(llama), [1, [0, 2]]
    for positions in (
        plain,
        [np.int64(1), np.array([0, 2])],
        [torch.tensor(1), torch.tensor([0, 2])],
    ):
        with steer(llama, BLOCK, Rotate(120), target, positions):
            written = generate(llama, PROMPTS[:1] * 2, N_NEW)
        if positions is plain:
            expected = written
        assert written == expected
    with steer(llama, BLOCK, Rotate(120), target, np.array([1, 1])):
        assert generate(llama, PROMPTS[:1] * 2, N_NEW)[1] == expected[0]


def test_a_text_may_fill_the_context_to_its_end(llama: Decoder) -> None:
    llama.model.generation_config.eos_token_id = None
    assert len(generate(llama, [[3] * 62], 2)[0]) == 2


def test_leaving_the_context_restores_the_logits_bit_for_bit(decoder: Decoder) -> None:
    before = logits(decoder, PROMPTS[0])
    with steer(decoder, BLOCK, Scale(2.0), target_of(decoder), [[2]]):
        assert not torch.equal(logits(decoder, PROMPTS[0]), before)
    assert torch.equal(logits(decoder, PROMPTS[0]), before)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        steer(decoder, BLOCK, Scale(2.0), target_of(decoder), [[2]]),
    ):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(decoder, PROMPTS[0]), before)


def test_generation_stops_at_the_end_of_text(llama: Decoder) -> None:
    llama.model.generation_config.eos_token_id = None
    free = generate(llama, [PROMPTS[0]], N_NEW)[0]
    llama.model.generation_config.eos_token_id = [free[2]]
    try:
        stopped = generate(llama, [PROMPTS[0]], N_NEW)[0]
    finally:
        llama.model.generation_config.eos_token_id = None
    assert stopped == free[: free.index(free[2])]


def test_what_cannot_be_steered_is_refused_in_one_line(llama: Decoder) -> None:
    target = target_of(llama)

    def attempt(block: int = BLOCK, donor: Tensor = target, positions: Any = (1,)) -> None:
        with steer(llama, block, Rotate(20), donor, positions):
            logits(llama, PROMPTS[0])

    for call, message in (
        (lambda: attempt(block=99), "Block 99 does not exist"),
        (lambda: attempt(donor=target[:-1]), "expected \\[32\\]"),
        (lambda: attempt(donor=target.expand(2, -1)), "\\[1 prompts, 32\\]"),
        (lambda: attempt(positions=[[-1]]), "Position -1 does not exist"),
        (lambda: attempt(positions=[[1, 9]]), "Position 9 of prompt 0 was in no pass"),
        (lambda: attempt(positions=[1, 2]), "1 rows, but positions were given for 2"),
        (lambda: attempt(positions=[]), "No positions"),
        (lambda: generate(llama, [], 3), "got 0 prompts"),
        (lambda: generate(llama, [[1], []], 3), "at least one token"),
        (lambda: generate(llama, [1, 2], 3), "Prompt 0 is 1, no list"),
        (lambda: generate(llama, [[1], [3] * 62], 3), "62 tokens and 3 new ones .* the 64 that"),
        (lambda: attempt(positions=[1.5]), r"Positions are whole numbers, got \[1\.5\]"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


SEVERAL = {
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "greedy": {"do_sample": False},
}


@pytest.mark.parametrize("how", SEVERAL)
@pytest.mark.parametrize("use_cache", [True, False])
def test_all_sequences_of_a_prompt_are_edited_at_its_own_positions(
    llama: Decoder, how: str, use_cache: bool
) -> None:
    """As by a hook that edits columns of the whole text, which is computed anew for each token."""
    positions = [[2, 4], [1, 5]]
    targets = torch.randn(2, llama.d_model, generator=torch.Generator().manual_seed(3))
    tokens = torch.tensor([[5, 9, 12, 33], [0, 7, 21, 8]])
    options = {
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "pad_token_id": 0,
        **SEVERAL[how],
    }
    llama.model.generation_config.eos_token_id = None

    def change(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        n_each = len(hidden) // 2
        for row in range(len(hidden)):
            for place in positions[row // n_each]:
                column = place + (row // n_each)  # the second prompt is padded by one
                if column < hidden.shape[1]:
                    state = hidden[row, column]
                    hidden[row, column] = Rotate(150)(state, targets[row // n_each])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def written(cached: bool) -> Tensor:
        torch.manual_seed(1)
        return llama.model.generate(tokens, use_cache=cached, **options)

    handle = llama.blocks[BLOCK].register_forward_hook(change)
    expected = written(cached=False)
    handle.remove()
    with steer(llama, BLOCK, Rotate(150), targets, positions):
        found = written(cached=use_cache)
    assert torch.equal(found, expected)
    assert len(found) == 2 * options.get("num_return_sequences", 1)
    assert not torch.equal(written(cached=True), expected)


def test_rows_that_repeat_no_prompt_are_refused(llama: Decoder) -> None:
    others = torch.tensor([[5, 9, 4], [5, 9, 5], [8, 3, 17], [8, 3, 17]])
    for tokens in (others, others[:3]):
        with (
            pytest.raises(ValueError, match=r"\d rows, but positions were given for 2 prompts"),
            torch.no_grad(),
            steer(llama, BLOCK, Rotate(20), target_of(llama), [1, 2]),
        ):
            llama.model(tokens)


def test_an_edit_that_breaks_its_word_is_named_with_block_and_prompt(llama: Decoder) -> None:
    target, prompts = target_of(llama), [[5, 9, 4], [8, 3, 17]]

    def broken(state: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
        changed = state.clone()
        changed[1] = torch.nan
        return changed

    with (
        pytest.raises(ValueError, match=f"edit after block {BLOCK} returned NaN .* prompt 1;"),
        steer(llama, BLOCK, broken, target, [1, 2]),
    ):
        generate(llama, prompts, 1)
    with (
        pytest.raises(ValueError, match=r"returned dtype torch\.float64 for prompt 0"),
        steer(llama, BLOCK, lambda state, donor: state.double(), target, [1, 2]),
    ):
        generate(llama, prompts, 1)
