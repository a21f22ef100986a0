"""Tiny configurations of any causal architecture of transformers, by rule.

Sizes that configurations share by name are made small; what then does not fit together stands in
`OTHERWISE`, by architecture.
"""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size"], 32),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "decoder_ffn_dim"],
        48,
    ),
    **dict.fromkeys(["encoder_ffn_dim", "dim_ff", "dff", "shared_expert_intermediate_size"], 48),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], 4
    ),
    **dict.fromkeys(["encoder_layers", "num_decoder_layers", "num_encoder_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_encoder_attention_heads"], 4),
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(["head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 64),
    # Mixtures of experts
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "moe_top_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size"], 16),
    # State-space and linear attention
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "linear_key_head_dim"], 8),
    "linear_value_head_dim": 8,
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"], 4),
    "linear_head_dim": 8,
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 4),
    **dict.fromkeys(["mamba_n_groups", "n_groups"], 2),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PART = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "head_dim": 8,
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "vocab_size": 260,
        **{f"{name}_config": PART for name in ("patcher", "encoder", "decoder", "global")},
    },
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 2.0},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 16, "per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
    },
    "gemma4_text": {
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
    },
    "git": {"vision_config": {**PART, "image_size": 16, "patch_size": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 4},
    "opt": {"word_embed_proj_dim": 32},
    "phi4_multimodal": {
        "vision_config": {**PART, "image_size": 28, "crop_size": 28},
        "audio_config": {**PART, "num_blocks": 2},
    },
    "qwen4_exp_text": {"ple_embed_dim": 8, "ngram_vocab_size_base": 64, "hc_lowrank": 4},
    "reformer": {
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"] * 2,
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Windows that are shorter than the tests' prompts.
SIZES |= {"sliding_window": 6, "attention_window_size": 6}


def text_part(architecture: str) -> str:
    """Return the architecture of the part that reads text, mostly the whole."""
    part = str(AutoConfig.for_model(architecture).get_text_config(decoder=True).model_type)
    return part if part in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else architecture


def tiny_config(architecture: str) -> Any:
    """Return a small configuration; that of the text part, where there are several."""
    part = text_part(architecture)
    default = AutoConfig.for_model(part)
    if part not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or default.get_text_config(
        decoder=True
    ).model_type not in (part, architecture):
        default = default.get_text_config(decoder=True)
    known = {*default.to_dict(), *default.attribute_map}
    given = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= OTHERWISE.get(part, {})
    return type(default)(**given)


def build(architecture: str) -> PreTrainedModel:
    """Return a tiny model with weights as they are drawn."""
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_part(architecture)])
    return kind(tiny_config(architecture))
