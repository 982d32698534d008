"""Architectures of published models by name, as in their config.json."""

from typing import Any

from megatron_brain.config.model import ModelConfig, ResolvedModel
from megatron_brain.errors import ConfigError, did_you_mean
from megatron_brain.models.architecture import resolve

_LLAMA_3 = {
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rotary_base": 5e5,
    "untie_embeddings_and_output_weights": True,
    "hf_model_type": "llama",
}
_LLAMA_3_1 = {
    **_LLAMA_3,
    "max_position_embeddings": 131072,
    "rope_scaling_factor": 8.0,
    "rope_original_max_position_embeddings": 8192,
}
_LLAMA_3_2 = {**_LLAMA_3_1, "rope_scaling_factor": 32.0, "untie_embeddings_and_output_weights": False}
_QWEN_2_5 = {
    "kv_channels": 128,
    "max_position_embeddings": 131072,
    "rotary_base": 1e6,
    "norm_epsilon": 1e-6,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "hf_model_type": "qwen2",
}


def _sizes(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads}


PRESETS: dict[str, dict[str, Any]] = {
    "llama3-8b": {**_LLAMA_3, **_sizes(32, 4096, 14336, 32)},
    "llama3-70b": {**_LLAMA_3, **_sizes(80, 8192, 28672, 64)},
    "llama3.1-8b": {**_LLAMA_3_1, **_sizes(32, 4096, 14336, 32)},
    "llama3.1-70b": {**_LLAMA_3_1, **_sizes(80, 8192, 28672, 64)},
    "llama3.1-405b": {**_LLAMA_3_1, **_sizes(126, 16384, 53248, 128)},
    "llama3.2-1b": {**_LLAMA_3_2, **_sizes(16, 2048, 8192, 32), "kv_channels": 64},
    "llama3.2-3b": {**_LLAMA_3_2, **_sizes(28, 3072, 8192, 24)},
    "qwen2.5-7b": {**_QWEN_2_5, **_sizes(28, 3584, 18944, 28), "num_query_groups": 4, "vocab_size": 152064},
    "qwen2.5-72b": {**_QWEN_2_5, **_sizes(80, 8192, 29568, 64), "num_query_groups": 8, "vocab_size": 152064},
    "mistral-7b": {
        **_sizes(32, 4096, 14336, 32),
        "num_query_groups": 8,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rotary_base": 1e6,
        "untie_embeddings_and_output_weights": True,
        "hf_model_type": "mistral",
    },
    "smollm2-135m": {
        **_sizes(30, 576, 1536, 9),
        "num_query_groups": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rotary_base": 1e5,
        "hf_model_type": "llama",
    },
}
"""Sizes of each model, with the keys of ARCHITECTURE_FIELDS; a missing key has its default."""


def preset(name: str) -> ResolvedModel:
    """The architecture of a published model, every size resolved.

    Raises:
        ConfigError: no preset has that name.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise ConfigError(f"model {name!r}: there is no such preset; there are {', '.join(PRESETS)}{hint}")
    return resolve(ModelConfig(), PRESETS[name], name)
