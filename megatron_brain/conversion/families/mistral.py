"""Mistral 7B and all that say `MistralForCausalLM`: Llama's weights, and in some versions attention over a window."""

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.config_json import (
    ROPE_DEFAULTS,
    read_activation,
    read_rope,
    read_sizes,
    write_rope,
    write_sizes,
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
from megatron_brain.conversion.family import Family


def _from_hf(config: dict) -> dict:
    read_activation("Mistral", config["hidden_act"], allowed=("silu",))
    sizes = read_sizes(config, LLAMA_SIZES)
    return {
        **sizes,
        "num_query_groups": config["num_key_value_heads"] or sizes["num_attention_heads"],
        "kv_channels": config["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"],
        **read_rope("Mistral", config),
        "window_size": config["sliding_window"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def _to_hf(model: ModelConfig) -> dict:
    return {
        **write_sizes(model, LLAMA_SIZES),
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        **write_rope(model),
        "sliding_window": model.window_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
    }


FAMILY = Family(
    name="Mistral",
    model_type="mistral",
    policy_class="MistralForCausalLM",
    reward_class="MistralForSequenceClassification",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        **ROPE_DEFAULTS,
    },
    fixed={**LLAMA_FIXED, "rotary_percent": 1.0},
    from_hf=_from_hf,
    to_hf=_to_hf,
    embedding=LLAMA_EMBEDDING,
    layer=LLAMA_LAYER,
    final=LLAMA_FINAL,
    output=LLAMA_OUTPUT,
    reward_head=LLAMA_REWARD_HEAD,
    hf_layers="model.layers",
    hf_final_norm="model.norm",
    prefix="model.",
)
