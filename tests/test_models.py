"""Models: parts found by structure, wrong models refused in one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from tiny import tiny_config
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lib.engine.edits import exchange
from lib.engine.extraction import extract_residuals
from lib.engine.generation import generate
from lib.engine.models import Decoder, load_decoder
from lib.engine.passes import run_blocks
from lib.engine.structure import untuple
from lib.engine.sweeps import sweep_blocks


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


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_vocabularys_logits_are_those_of_one_product(llama: Decoder, bias: bool) -> None:
    whole = nn.Linear(16, 2500, bias=bias)
    decoder = replace(llama, unembedding=whole, logit_scale=0.5)
    for normed in (torch.randn(70, 16), torch.randn(3, 5, 16), torch.randn(16), torch.randn(0, 16)):
        with torch.inference_mode():
            found = decoder.unembed(normed)
            assert found.shape == (*normed.shape[:-1], 2500)
            assert torch.allclose(found, 0.5 * whole(normed), atol=1e-5)


def test_an_unembedding_that_is_more_than_its_weights_is_called_as_it_is(llama: Decoder) -> None:
    class Doubled(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return 2 * super().forward(states)

    hooked, wrapped = nn.Linear(16, 2500), nn.Linear(16, 2500)
    hooked.register_forward_hook(lambda _module, _args, output: 2 * output)
    wrapped.forward = lambda states: 2 * nn.functional.linear(states, wrapped.weight, wrapped.bias)
    normed = torch.randn(7, 16)
    for layer in (Doubled(16, 2500), hooked, wrapped):
        with torch.inference_mode():
            found = replace(llama, unembedding=layer).unembed(normed)
            few = replace(llama, unembedding=layer).unembed(normed, [7, 2499, 7])
            expected = 2 * nn.functional.linear(normed, layer.weight, layer.bias)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(few, expected[:, [7, 2499, 7]], atol=1e-5)
    kept = torch.randn(7, llama.d_model, requires_grad=True)
    llama.unembed(kept).sum().backward()
    assert kept.grad is not None


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


def test_what_is_set_on_a_twin_of_a_model_in_hand_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    before = model.config.to_json_string()
    twin = load_decoder(model, tokenizer=tiny_tokenizer(), untrained=True, dtype="bfloat16")
    twin.model.set_attn_implementation("eager")
    assert model.config.to_json_string() == before
    assert model.config._attn_implementation == "sdpa"


def test_each_seed_has_a_twin_of_its_own() -> None:
    trained = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())

    def twin(seed: int) -> Decoder:
        return load_decoder(trained.model, tokenizer=trained.tokenizer, untrained=True, seed=seed)

    weights = [twin(seed).unembedding.weight for seed in (0, 1, 2, 1)]
    assert torch.equal(weights[1], weights[3])
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert (twin(2).untrained, twin(2).seed, twin(2).name) == (True, 2, trained.name)


def test_a_trained_model_has_no_seed(llama: Decoder) -> None:
    for options in ({"seed": 1}, {"untrained": True, "seed": -1}):
        with pytest.raises(ValueError, match="untrained twins have seeds 0, 1, …"):
            load_decoder(llama.model, tokenizer=llama.tokenizer, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "cpu"}, "device"),
        ({"revision": "main", "dtype": "float16"}, "dtype, revision"),
        ({"untrained": True, "device_map": "auto", "device": "cpu"}, "device_map"),
        ({"untrained": True, "quantization": "4bit"}, "quantization"),
    ],
)
def test_what_only_loading_can_do_is_refused_for_a_model_in_hand(
    llama: Decoder, options: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=f"taken as it is, so {named} cannot be given"):
        load_decoder(llama.model, tokenizer=llama.tokenizer, **options)  # type: ignore[arg-type]


def test_a_tokenizer_for_a_named_model_is_refused_before_anything_is_read(llama: Decoder) -> None:
    with pytest.raises(ValueError, match="'no/such-model' brings its tokenizer"):
        load_decoder("no/such-model", tokenizer=llama.tokenizer)


def test_label_never_names_a_folder_above_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert load_decoder(folder).name == "my-model"


def test_loading_freezes_the_weights(tmp_path: Path) -> None:
    tiny_model("llama").train().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for untrained in (False, True):
        model = load_decoder(tmp_path, untrained=untrained).model
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())


def test_a_model_in_hand_is_measured_without_dropout_and_keeps_its_mode_and_gradients() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[2].eval()
    model.transformer.wte.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    attention = model.config._attn_implementation
    prompts, pairs = [[5, 9, 4], [8, 3, 17]], np.array([[0, 1]])

    def measure(decoder: Decoder) -> list[np.ndarray]:
        read = extract_residuals(decoder, prompts, logits=True)
        swept = sweep_blocks(
            decoder, prompts, pairs, {"x": exchange}, positions="last", read_ids=range(64)
        )
        written = generate(decoder, prompts, 4)
        assert read.logits is not None
        return [read.states.numpy(), read.logits.numpy(), swept.logits, np.array(written)]

    found = measure(load_decoder(model, tokenizer=tiny_tokenizer()))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert model.config._attn_implementation == attention
    expected = measure(load_decoder(model.eval(), tokenizer=tiny_tokenizer()))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


class Adapted(nn.Module):
    """As PEFT wraps a model: adapters lie in the layers of the model inside."""

    def __init__(self, model: nn.Module, prompt_learning: bool = False) -> None:
        super().__init__()
        self.inner = model
        self.active_peft_config = SimpleNamespace(is_prompt_learning=prompt_learning)

    def get_base_model(self) -> nn.Module:
        return self.inner


class Wrapped(nn.Module):
    """As torch's parallel modules wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


class Adapter(nn.Module):
    """As LoRA changes a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.base_layer(states) + self.up(self.down(states))


@pytest.mark.parametrize("wrap", [torch.compile, Adapted, Wrapped, lambda m: Wrapped(Adapted(m))])
def test_a_wrapped_model_is_measured_with_its_adapters(wrap: Callable[..., nn.Module]) -> None:
    prompt = [5, 9, 4, 33]
    model = tiny_model("llama")
    plain = oracle.forward(model, [prompt])
    attention = model.model.layers[1].self_attn
    attention.v_proj = Adapter(attention.v_proj)
    adapted = oracle.forward(model, [prompt])
    assert not torch.allclose(adapted, plain, atol=1e-2)
    decoder = load_decoder(wrap(model), tokenizer=tiny_tokenizer())
    found = extract_residuals(decoder, [prompt], blocks=(), logits=True).logits
    assert found is not None and torch.allclose(found, adapted, atol=1e-4)
    pairs = np.array([[0, 1]])
    edits = {"exchange": exchange}
    sweep = sweep_blocks(
        decoder, [prompt, [8, 3, 17, 9]], pairs, edits, positions="last", read_ids=range(64)
    )
    state = oracle.block_states(model, [decoder.blocks[0]], [8, 3, 17, 9])[0, [-1]]
    expected = oracle.patched_logits(model, decoder.blocks[0], [prompt], [[-1]], [state])
    assert np.abs(sweep.logits[0, 0] - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize(("wrapper", "text"), [("gemma3", "gemma3_text"), ("llava", "llama")])
def test_of_a_model_that_also_sees_the_part_that_writes_text_is_measured(
    wrapper: str, text: str
) -> None:
    """Also where the part that sees is as deep, and larger."""
    seeing = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    seeing |= {"intermediate_size": 192, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        wrapper, text_config=tiny_config(text).to_dict(), vision_config=seeing
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    decoder = load_decoder(model, tokenizer=tiny_tokenizer())
    assert "Decoder" in type(decoder.blocks[0]).__name__ and decoder.d_model == 32
    prompt = [5, 9, 4, 33]
    found = extract_residuals(decoder, [prompt], logits=True)
    assert found.logits is not None
    assert torch.allclose(found.logits, oracle.forward(model, [prompt]), atol=1e-4)
    expected = oracle.block_states(model, decoder.blocks, prompt)[:, -1]
    assert torch.allclose(found.states[:, 0], expected, atol=1e-5)


def test_what_cannot_be_measured_inside_its_wrapper_is_refused() -> None:
    compiled = tiny_model("llama")
    compiled.model.layers[0].compile()
    for model, words in (
        (Adapted(tiny_model("llama"), prompt_learning=True), "learned tokens before each prompt"),
        (nn.Linear(3, 3), "Linear is no model of transformers and holds none"),
        (compiled, "compiled in place"),
    ):
        with pytest.raises(ValueError, match=words) as problem:
            load_decoder(model, tokenizer=tiny_tokenizer())
        one_line(problem)


def test_what_goes_wrong_in_a_models_own_code_is_told_in_one_line() -> None:
    model = tiny_model("llama")

    def broken(*_args: object, **_options: object) -> None:
        raise KeyError("pixel_values\nand more")

    model.model.forward = broken
    assert "cannot be run on a few tokens alone: KeyError 'pixel_values" in refusal(model)


def test_a_model_that_names_no_number_of_blocks_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 0
    assert "names no number of blocks" in refusal(model)


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
