"""Qwen 3 (dense): Llama's weights, and an RMSNorm over each head of queries and keys."""

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.config_json import (
    ROPE_DEFAULTS,
    WINDOW_DEFAULTS,
    read_activation,
    read_rope,
    read_sizes,
    read_window_by_layer,
    write_rope,
    write_sizes,
    write_window_by_layer,
)
from megatron_brain.conversion.families.llama import (
    LLAMA_EMBEDDING,
    LLAMA_FINAL,
    LLAMA_FIXED,
    LLAMA_LAYER,
    LLAMA_OUTPUT,
    LLAMA_REWARD_HEAD,
    LLAMA_SIZES,
)
from megatron_brain.conversion.family import Family, Source, Weight, refuse

_ATTENTION = "decoder.layers.{layer}.self_attention."
_HF = "model.layers.{layer}.self_attn."

_QK_NORMS = (
    Weight(_ATTENTION + "q_layernorm.weight", (Source(_HF + "q_norm.weight", ("head",)),)),
    Weight(_ATTENTION + "k_layernorm.weight", (Source(_HF + "k_norm.weight", ("head",)),)),
)
_SIZES = {**LLAMA_SIZES, "kv_channels": "head_dim"}


def _from_hf(config: dict) -> dict:
    refuse("Qwen3", {"attention_bias=true (biases in the attention)": config["attention_bias"]})
    read_activation("Qwen3", config["hidden_act"], allowed=("silu",))
    sizes = read_sizes(config, _SIZES)
    return {
        **sizes,
        "num_query_groups": config["num_key_value_heads"] or sizes["num_attention_heads"],
        **read_rope("Qwen3", config),
        **read_window_by_layer("Qwen3", config),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def _to_hf(model: ModelConfig) -> dict:
    return {
        **write_sizes(model, _SIZES),
        "num_key_value_heads": model.num_query_groups,
        **write_rope(model),
        **write_window_by_layer(model),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
    }


FAMILY = Family(
    name="Qwen3",
    model_type="qwen3",
    policy_class="Qwen3ForCausalLM",
    reward_class="Qwen3ForSequenceClassification",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        **WINDOW_DEFAULTS,
        **ROPE_DEFAULTS,
    },
    fixed={**LLAMA_FIXED, "rotary_percent": 1.0, "qk_layernorm": True},
    from_hf=_from_hf,
    to_hf=_to_hf,
    embedding=LLAMA_EMBEDDING,
    layer=(*LLAMA_LAYER, *_QK_NORMS),
    final=LLAMA_FINAL,
    output=LLAMA_OUTPUT,
    reward_head=LLAMA_REWARD_HEAD,
    hf_layers="model.layers",
    hf_final_norm="model.norm",
    prefix="model.",
)
