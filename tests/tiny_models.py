# SPDX-License-Identifier: MIT
"""Random models of a few layers, one per family of attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
_DEEPSEEK = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_FALCON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "bias": False,
}
_GPT = {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 8}

#: Decoders that can be exported: configuration class, its arguments, and (Hkv, D) of the cache.
DECODERS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}, (2, 8)),
    "gpt_bigcode": ("GPTBigCodeConfig", {"multi_query": True}, (1, 8)),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 16}, (1, 16)),
    "gemma2": (
        "Gemma2Config",
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},
        (2, 16),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4, "num_hidden_layers": 6},
        (1, 16),
    ),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 4}, (2, 8)),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}, (2, 16)),
    "falcon": ("FalconConfig", {"multi_query": True, "alibi": False}, (1, 8)),
    "falcon_new": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        (2, 8),
    ),
    # A latent of 32 and a rotary key of 8 in one buffer
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK, (1, 40)),
    "minicpm3": ("MiniCPM3Config", _DEEPSEEK, (1, 40)),
    "gpt2": ("GPT2Config", {}, (8, 8)),
}

#: Decoders that cannot, with what the message must say.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon_alibi": (
        "FalconConfig",
        {"multi_query": True, "alibi": True},
        r"layer transformer\.h\.0\.self_attention \(FalconAttention\) uses ALiBi",
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 64, "n_layer": 2, "n_head": 8},
        r"layer transformer\.h\.0\.self_attention \(BloomAttention\) computes attention itself",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        r"layer model\.layers\.0\.self_attn \(GptOssAttention\) uses attention sinks",
    ),
}


def make(config_class: str, values: dict[str, Any], auto: str = "AutoModelForCausalLM") -> Any:
    """A model with random weights of a fixed seed, in float32 with eager attention."""
    common: dict[str, Any] = _COMMON
    if config_class.startswith("Falcon"):
        common = _FALCON
    elif config_class.startswith("GPT"):
        common = _GPT
    elif config_class in ("BloomConfig", "DistilBertConfig", "MambaConfig"):
        common = {"vocab_size": 128}
    config = getattr(transformers, config_class)(**{**common, **values})
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager")
    transformers.logging.set_verbosity(verbosity)
    return model.eval()


def decoder(name: str) -> Any:
    """One of `DECODERS`."""
    config_class, values, _ = DECODERS[name]
    return make(config_class, values)
