"""Qwen 2 and 2.5: Llama's weights, and biases of queries, keys and values."""

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
from megatron_brain.conversion.family import Family, Source, Weight
from megatron_brain.conversion.fusion import QKV

_QKV_BIAS = Weight(
    "decoder.layers.{layer}.self_attention.linear_qkv.bias",
    (
        Source("model.layers.{layer}.self_attn.q_proj.bias", ("query",)),
        Source("model.layers.{layer}.self_attn.k_proj.bias", ("key_value",)),
        Source("model.layers.{layer}.self_attn.v_proj.bias", ("key_value",)),
    ),
    QKV,
)


def _from_hf(config: dict) -> dict:
    read_activation("Qwen2", config["hidden_act"], allowed=("silu",))
    sizes = read_sizes(config, LLAMA_SIZES)
    return {
        **sizes,
        "num_query_groups": config["num_key_value_heads"] or sizes["num_attention_heads"],
        "kv_channels": config["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"],
        **read_rope("Qwen2", config),
        **read_window_by_layer("Qwen2", config),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def _to_hf(model: ModelConfig) -> dict:
    # Qwen2Config has no field for it, but its model reads it where it is there.
    usual_head = model.kv_channels * model.num_attention_heads == model.hidden_size
    return {
        **write_sizes(model, LLAMA_SIZES),
        "num_key_value_heads": model.num_query_groups,
        **({} if usual_head else {"head_dim": model.kv_channels}),
        **write_rope(model),
        **write_window_by_layer(model),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
    }


FAMILY = Family(
    name="Qwen2",
    model_type="qwen2",
    policy_class="Qwen2ForCausalLM",
    reward_class="Qwen2ForSequenceClassification",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **WINDOW_DEFAULTS,
        **ROPE_DEFAULTS,
    },
    fixed={**LLAMA_FIXED, "rotary_percent": 1.0, "add_qkv_bias": True},
    from_hf=_from_hf,
    to_hf=_to_hf,
    embedding=LLAMA_EMBEDDING,
    layer=(*LLAMA_LAYER, _QKV_BIAS),
    final=LLAMA_FINAL,
    output=LLAMA_OUTPUT,
    reward_head=LLAMA_REWARD_HEAD,
    hf_layers="model.layers",
    hf_final_norm="model.norm",
    prefix="model.",
)
