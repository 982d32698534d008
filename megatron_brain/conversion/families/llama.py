"""Llama 2, 3, 3.1 and 3.2, SmolLM2 and all that say `LlamaForCausalLM`.

Mistral, Qwen 2, Qwen 3 and Phi-3 share rows of this table and add their own.
"""

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.config_json import (
    ROPE_DEFAULTS,
    read_activation,
    read_rope,
    read_sizes,
    write_rope,
    write_sizes,
)
from megatron_brain.conversion.family import Family, Source, Weight, refuse
from megatron_brain.conversion.fusion import GATE_UP, QKV

_ATTENTION = "decoder.layers.{layer}.self_attention."
_MLP = "decoder.layers.{layer}.mlp."
_HF = "model.layers.{layer}."

LLAMA_EMBEDDING = (
    Weight("embedding.word_embeddings.weight", (Source("model.embed_tokens.weight", ("vocab", "hidden")),)),
)
LLAMA_LAYER = (
    Weight(_ATTENTION + "linear_qkv.layer_norm_weight", (Source(_HF + "input_layernorm.weight", ("hidden",)),)),
    Weight(
        _ATTENTION + "linear_qkv.weight",
        (
            Source(_HF + "self_attn.q_proj.weight", ("query", "hidden")),
            Source(_HF + "self_attn.k_proj.weight", ("key_value", "hidden")),
            Source(_HF + "self_attn.v_proj.weight", ("key_value", "hidden")),
        ),
        QKV,
    ),
    Weight(_ATTENTION + "linear_proj.weight", (Source(_HF + "self_attn.o_proj.weight", ("hidden", "query")),)),
    Weight(_MLP + "linear_fc1.layer_norm_weight", (Source(_HF + "post_attention_layernorm.weight", ("hidden",)),)),
    Weight(
        _MLP + "linear_fc1.weight",
        (
            Source(_HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
            Source(_HF + "mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        GATE_UP,
    ),
    Weight(_MLP + "linear_fc2.weight", (Source(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),)),
)
LLAMA_FINAL = (Weight("decoder.final_layernorm.weight", (Source("model.norm.weight", ("hidden",)),)),)
LLAMA_OUTPUT = Weight("output_layer.weight", (Source("lm_head.weight", ("vocab", "hidden")),))
LLAMA_REWARD_HEAD = Weight("reward_head.weight", (Source("score.weight", ("label", "hidden")),))

LLAMA_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
LLAMA_FIXED = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "qk_layernorm": False,
    "hidden_act": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "use_parallel_residual": False,
}


def _from_hf(config: dict) -> dict:
    window = config["sliding_window"]
    refuse(
        "Llama",
        {
            "attention_bias=true (biases in the attention)": config["attention_bias"],
            "mlp_bias=true (biases in the feed-forward)": config["mlp_bias"],
            f"sliding_window={window} (attention over a window)": window is not None,
        },
    )
    read_activation("Llama", config["hidden_act"], allowed=("silu",))
    sizes = read_sizes(config, LLAMA_SIZES)
    return {
        **sizes,
        "num_query_groups": config["num_key_value_heads"] or sizes["num_attention_heads"],
        "kv_channels": config["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"],
        **read_rope("Llama", config),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def _to_hf(model: ModelConfig) -> dict:
    return {
        **write_sizes(model, LLAMA_SIZES),
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        **write_rope(model),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
    }


def _limits(model: ModelConfig) -> dict[str, bool]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    return {f"hidden_size={hidden}, which is not a multiple of num_attention_heads={heads}": hidden % heads != 0}


FAMILY = Family(
    name="Llama",
    model_type="llama",
    policy_class="LlamaForCausalLM",
    reward_class="LlamaForSequenceClassification",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        **ROPE_DEFAULTS,
    },
    fixed={**LLAMA_FIXED, "rotary_percent": 1.0, "window_size": None},
    from_hf=_from_hf,
    to_hf=_to_hf,
    limits=_limits,
    embedding=LLAMA_EMBEDDING,
    layer=LLAMA_LAYER,
    final=LLAMA_FINAL,
    output=LLAMA_OUTPUT,
    reward_head=LLAMA_REWARD_HEAD,
    hf_layers="model.layers",
    hf_final_norm="model.norm",
    prefix="model.",
)
