"""Models: parts found by structure, wrong models refused in one line."""

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lib.engine.models import Decoder, load_decoder
from lib.engine.passes import run_blocks
from lib.engine.structure import untuple


def test_final_norm_and_unembedding_of_the_last_block_give_the_models_logits(
    decoder: Decoder,
) -> None:
    tokens = torch.tensor([[5, 9, 4, 33, 12]])
    states = run_blocks(decoder, tokens, {decoder.n_blocks - 1})[decoder.n_blocks - 1]
    with torch.no_grad():
        expected = decoder.model(tokens).logits
    rebuilt = decoder.unembed(decoder.final_norm(states))
    assert torch.allclose(rebuilt, expected, atol=1e-4)


def test_logits_of_named_tokens_are_columns_of_the_full_logits(decoder: Decoder) -> None:
    states = torch.randn(3, decoder.d_model)
    normed = decoder.final_norm(states)
    full = decoder.unembed(normed)
    assert torch.allclose(decoder.unembed(normed, [7, 1, 60]), full[:, [7, 1, 60]], atol=1e-5)


def test_blocks_run_in_their_order_of_depth(decoder: Decoder) -> None:
    assert decoder.n_blocks == 4
    assert len(set(decoder.blocks)) == 4
    prompt = [5, 9, 4, 33]
    states = oracle.block_states(decoder.model, decoder.blocks, prompt)
    with torch.no_grad():
        entries = decoder.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    first = 0 if decoder.model.config.model_type == "mamba" else 1  # it leaves out the embedding
    for block in range(3):  # the last entry is after the final norm and so is left out
        assert torch.allclose(states[block], entries[block + first][0], atol=1e-5)


def test_untrained_twin_is_the_same_each_time_and_keeps_the_random_state(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = (load_decoder(tmp_path, untrained=True) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.unembedding.weight, second.unembedding.weight)
    trained = load_decoder(tmp_path)
    assert first.untrained and not trained.untrained
    assert not torch.equal(first.unembedding.weight, trained.unembedding.weight)


def test_label_never_names_a_folder_above_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert load_decoder(folder).name == "my-model"


def test_loading_freezes_the_weights(llama: Decoder) -> None:
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())
    assert not llama.model.training


def one_line(problem: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(problem.value)
    assert "\n" not in message
    return message


def test_unknown_hub_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError) as problem:
        load_decoder("nobody/no-such-model")
    assert "nobody/no-such-model" in one_line(problem) and "smollm2-135m" in one_line(problem)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as problem:
        load_decoder(tmp_path)
    assert "config.json is missing" in one_line(problem)


def test_missing_folder_is_refused() -> None:
    with pytest.raises(ValueError) as problem:
        load_decoder("./no/such/folder")
    assert "does not exist" in one_line(problem)


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as problem:
        load_decoder(tmp_path)
    assert "encoder–decoder" in one_line(problem)


def test_encoder_is_refused_because_later_tokens_change_earlier_logits() -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ValueError) as problem:
        load_decoder(BertLMHeadModel(config).eval(), tokenizer=tiny_tokenizer())
    assert "not causal" in one_line(problem)


def test_model_without_unembedding_is_refused(llama: Decoder) -> None:
    bare = AutoModel.from_config(llama.model.config)
    with pytest.raises(ValueError) as problem:
        load_decoder(bare, tokenizer=tiny_tokenizer())
    assert "unembedding" in one_line(problem)


def test_model_in_hand_needs_its_tokenizer(llama: Decoder) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        load_decoder(llama.model)


def refusal(model: LlamaForCausalLM) -> str:
    with pytest.raises(ValueError) as problem:
        load_decoder(model, tokenizer=tiny_tokenizer())
    return one_line(problem)


def intercept(model: LlamaForCausalLM, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let block 1 read `change(what comes in, what block 0 put out before any edit)`."""
    first, second = model.model.layers[:2]
    given: list = []

    def note(_module: object, inputs: tuple, options: dict) -> None:
        given[:] = [inputs, options]

    def replace(_module: object, inputs: tuple, options: dict) -> tuple:
        clean = untuple(first.forward(*given[0], **given[1]))
        return (change(inputs[0], clean), *inputs[1:]), options

    first.register_forward_pre_hook(note, with_kwargs=True)
    second.register_forward_pre_hook(replace, with_kwargs=True)


def test_a_model_without_its_stack_of_blocks_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    assert "no stack of num_hidden_layers = 7 blocks" in refusal(model)


def test_a_model_whose_blocks_run_more_than_once_is_refused() -> None:
    model = tiny_model("llama")
    first, last = model.model.layers[0], model.model.layers[-1]

    def again(_module: object, inputs: tuple, options: dict) -> None:
        first(*inputs, **options)

    last.register_forward_pre_hook(again, with_kwargs=True)
    assert "to run once" in refusal(model)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    assert "logits are not finite in float32" in refusal(model)


def test_a_model_whose_logits_are_not_its_unembedding_s_is_refused() -> None:
    model = tiny_model("llama")
    model.register_forward_hook(
        lambda _module, _inputs, output: setattr(output, "logits", 2 * output.logits)
    )
    assert "its logit lens would be wrong" in refusal(model)


def test_a_model_in_which_an_edit_spreads_to_earlier_tokens_is_refused() -> None:
    model = tiny_model("llama")
    intercept(model, lambda seen, clean: seen + (seen - clean).sum(dim=1, keepdim=True))
    assert "does not act on the edited token alone" in refusal(model)


def test_a_model_in_which_an_edit_is_lost_is_refused() -> None:
    model = tiny_model("llama")
    intercept(model, lambda _seen, clean: clean)
    assert "does not reach the logits" in refusal(model)
