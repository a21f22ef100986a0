"""Models for the tests: tiny random decoders of many architectures, and the embedded model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.engine import store
from lib.engine.models import Decoder, load_decoder

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_WIDTH = {name: value for name, value in SMALL.items() if name != "head_dim"}
EXPERTS: dict[str, Any] = {
    **SMALL,
    "num_local_experts": 4,  # Mixtral's name for it
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 6},
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma2": {**SMALL, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "gemma3_text": {
        **SMALL,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": SMALL,
    "gpt2": GPT2,
    "gpt_neox": {**SMALL, "use_parallel_residual": True},
    "gptj": {**GPT2, "rotary_dim": 4},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {**SMALL, "n_layer": 4, "n_head": 4},
    "falcon": NO_HEAD_WIDTH,
    "olmo2": SMALL,
    "stablelm": {**SMALL, "tie_word_embeddings": True},
    "smollm3": SMALL,
    "granite": {**SMALL, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "cohere": {**SMALL, "logit_scale": 2.0},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4},
    "bamba": {  # state-space and attention in turn
        **SMALL,
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_n_groups": 2,
    },
}


@pytest.fixture(autouse=True, scope="session")
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' states out of the book's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "STORE", tmp_path_factory.mktemp("store"))
        yield


def tiny_model(architecture: str) -> Any:
    """Return a random model whose logits are of the size of a trained model's, not near zero."""
    torch.manual_seed(7)
    model = build(architecture).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                if parameter.std() < 0.05:  # state-space weights start at their own size
                    parameter.mul_(8.0 if "embed" not in name else 4.0)
            else:  # biases and gains, which start as all zeros and all ones
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are whole words."""
    vocabulary = {word: index for index, word in enumerate(words or [f"w{i}" for i in range(64)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=next(iter(vocabulary)))


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A tiny random decoder, once per architecture."""
    return load_decoder(tiny_model(request.param), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="session")
def llama() -> Decoder:
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="session")
def embedded() -> Decoder:
    """The embedded model, real weights."""
    return load_decoder()


@pytest.fixture(scope="session")
def embedded_twin() -> Decoder:
    """Its untrained twin."""
    return load_decoder(untrained=True)
