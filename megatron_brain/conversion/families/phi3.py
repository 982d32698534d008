"""Phi-3 and Phi-4 with plain rotary positions: one tensor for queries, keys and values, one for gate and up."""

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
    LLAMA_OUTPUT,
    LLAMA_REWARD_HEAD,
    LLAMA_SIZES,
)
from megatron_brain.conversion.family import Family, Source, Weight
from megatron_brain.conversion.fusion import STACKED_QKV

_ATTENTION = "decoder.layers.{layer}.self_attention."
_MLP = "decoder.layers.{layer}.mlp."
_HF = "model.layers.{layer}."

_LAYER = (
    Weight(_ATTENTION + "linear_qkv.layer_norm_weight", (Source(_HF + "input_layernorm.weight", ("hidden",)),)),
    Weight(
        _ATTENTION + "linear_qkv.weight", (Source(_HF + "self_attn.qkv_proj.weight", ("qkv", "hidden")),), STACKED_QKV
    ),
    Weight(_ATTENTION + "linear_proj.weight", (Source(_HF + "self_attn.o_proj.weight", ("hidden", "query")),)),
    Weight(_MLP + "linear_fc1.layer_norm_weight", (Source(_HF + "post_attention_layernorm.weight", ("hidden",)),)),
    # The gate stands above, as ours does.
    Weight(_MLP + "linear_fc1.weight", (Source(_HF + "mlp.gate_up_proj.weight", ("gate_and_up", "hidden")),)),
    Weight(_MLP + "linear_fc2.weight", (Source(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),)),
)


def _from_hf(config: dict) -> dict:
    read_activation("Phi-3", config["hidden_act"], allowed=("silu",))
    sizes = read_sizes(config, LLAMA_SIZES)
    return {
        **sizes,
        "num_query_groups": config["num_key_value_heads"] or sizes["num_attention_heads"],
        "kv_channels": config["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"],
        **read_rope("Phi-3", config, types=("default",), partial=True),
        "window_size": config["sliding_window"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def _to_hf(model: ModelConfig) -> dict:
    # Phi3Config has no field for it, but its model reads it where it is there.
    usual_head = model.kv_channels * model.num_attention_heads == model.hidden_size
    return {
        **write_sizes(model, LLAMA_SIZES),
        "original_max_position_embeddings": model.max_position_embeddings,
        "num_key_value_heads": model.num_query_groups,
        **({} if usual_head else {"head_dim": model.kv_channels}),
        **write_rope(model),
        "sliding_window": model.window_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": model.init_method_std,
    }


def _limits(model: ModelConfig) -> dict[str, bool]:
    return {f"rope_scaling_factor={model.rope_scaling_factor}": model.rope_scaling_factor != 1.0}


FAMILY = Family(
    name="Phi-3",
    model_type="phi3",
    policy_class="Phi3ForCausalLM",
    reward_class="Phi3ForSequenceClassification",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        **ROPE_DEFAULTS,
    },
    fixed=LLAMA_FIXED,
    from_hf=_from_hf,
    to_hf=_to_hf,
    limits=_limits,
    embedding=LLAMA_EMBEDDING,
    layer=_LAYER,
    final=LLAMA_FINAL,
    output=LLAMA_OUTPUT,
    reward_head=LLAMA_REWARD_HEAD,
    hf_layers="model.layers",
    hf_final_norm="model.norm",
    prefix="model.",
)
