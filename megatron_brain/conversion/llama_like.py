"""What Llama and the families that are like it have in common.

Each of them is a call of `llama_like` with what is its own.
"""

from collections.abc import Mapping

from megatron_brain.conversion.config_json import (
    GROUPED_QUERY_HEADS,
    HEAD_SIZE,
    OUTPUT_TIE,
    ROPE_DEFAULTS,
    activation,
    fixed,
    rope,
    size,
)
from megatron_brain.conversion.family import ATTENTION, MLP, Family, Rule, Source, Weight
from megatron_brain.conversion.fusion import GATE_UP, QKV

_HF = "model.layers.{layer}."

LAYER = (
    Weight(ATTENTION + "linear_qkv.layer_norm_weight", (Source(_HF + "input_layernorm.weight", ("hidden",)),)),
    Weight(
        ATTENTION + "linear_qkv.weight",
        (
            Source(_HF + "self_attn.q_proj.weight", ("query", "hidden")),
            Source(_HF + "self_attn.k_proj.weight", ("key_value", "hidden")),
            Source(_HF + "self_attn.v_proj.weight", ("key_value", "hidden")),
        ),
        QKV,
    ),
    Weight(ATTENTION + "linear_proj.weight", (Source(_HF + "self_attn.o_proj.weight", ("hidden", "query")),)),
    Weight(MLP + "linear_fc1.layer_norm_weight", (Source(_HF + "post_attention_layernorm.weight", ("hidden",)),)),
    Weight(
        MLP + "linear_fc1.weight",
        (
            Source(_HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
            Source(_HF + "mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        GATE_UP,
    ),
    Weight(MLP + "linear_fc2.weight", (Source(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),)),
)

RULES = {
    "num_layers": size("num_hidden_layers"),
    "hidden_size": size("hidden_size"),
    "ffn_hidden_size": size("intermediate_size"),
    "num_attention_heads": size("num_attention_heads"),
    "num_query_groups": GROUPED_QUERY_HEADS,
    "kv_channels": HEAD_SIZE,
    "vocab_size": size("vocab_size"),
    "max_position_embeddings": size("max_position_embeddings"),
    "position_embedding_type": fixed("rope"),
    **rope(),
    "window_size": fixed(None),
    "normalization": fixed("RMSNorm"),
    "norm_epsilon": size("rms_norm_eps"),
    "qk_layernorm": fixed(False),
    "hidden_act": activation({"silu": "silu"}),
    "gated_linear_unit": fixed(True),
    "add_bias_linear": fixed(False),
    "add_qkv_bias": fixed(False),
    "use_parallel_residual": fixed(False),
    "untie_embeddings_and_output_weights": OUTPUT_TIE,
}

DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    **ROPE_DEFAULTS,
}


def llama_like(
    *,
    defaults: Mapping[str, object],
    rules: Mapping[str, Rule] | None = None,
    constants: Mapping[str, object] | None = None,
    **others: object,
) -> Family:
    """A family that is like Llama.

    Args:
        defaults: those of its config.json that DEFAULTS lacks or has otherwise.
        rules: those that differ from RULES.
        constants: further keys of every config.json that is written.
        others: the other attributes of `Family`. `layer` and the names of modules are Llama's where they are not given.
    """
    shared = {
        "embedding": (
            Weight("embedding.word_embeddings.weight", (Source("model.embed_tokens.weight", ("vocab", "hidden")),)),
        ),
        "layer": LAYER,
        "final": (Weight("decoder.final_layernorm.weight", (Source("model.norm.weight", ("hidden",)),)),),
        "output": Weight("output_layer.weight", (Source("lm_head.weight", ("vocab", "hidden")),)),
        "hf_layers": "model.layers",
        "hf_final_norm": "model.norm",
        "prefix": "model.",
    }
    return Family(
        defaults={**DEFAULTS, **defaults},
        rules={**RULES, **(rules or {})},
        constants={"attention_dropout": 0.0, **(constants or {})},
        **{**shared, **others},
    )
