"""GPT-2: learned positions, LayerNorm, biases, and weights stored `[in, out]` (transformers' Conv1D)."""

from megatron_brain.conversion.config_json import (
    OUTPUT_TIE,
    ROPE_FIELDS,
    UNUSED,
    activation,
    fixed,
    multi_head,
    size,
)
from megatron_brain.conversion.family import ATTENTION, MLP, Family, Rule, Source, Weight
from megatron_brain.conversion.fusion import STACKED_QKV, TRANSPOSED, TRANSPOSED_STACKED_QKV

_HF = "transformer.h.{layer}."

_EMBEDDING = (
    Weight("embedding.word_embeddings.weight", (Source("transformer.wte.weight", ("vocab", "hidden")),)),
    Weight("embedding.position_embeddings.weight", (Source("transformer.wpe.weight", ("positions", "hidden")),)),
)
_LAYER = (
    Weight(ATTENTION + "linear_qkv.layer_norm_weight", (Source(_HF + "ln_1.weight", ("hidden",)),)),
    Weight(ATTENTION + "linear_qkv.layer_norm_bias", (Source(_HF + "ln_1.bias", ("hidden",)),)),
    Weight(
        ATTENTION + "linear_qkv.weight",
        (Source(_HF + "attn.c_attn.weight", ("hidden", "qkv")),),
        TRANSPOSED_STACKED_QKV,
    ),
    Weight(ATTENTION + "linear_qkv.bias", (Source(_HF + "attn.c_attn.bias", ("qkv",)),), STACKED_QKV),
    Weight(ATTENTION + "linear_proj.weight", (Source(_HF + "attn.c_proj.weight", ("query", "hidden")),), TRANSPOSED),
    Weight(ATTENTION + "linear_proj.bias", (Source(_HF + "attn.c_proj.bias", ("hidden",)),)),
    Weight(MLP + "linear_fc1.layer_norm_weight", (Source(_HF + "ln_2.weight", ("hidden",)),)),
    Weight(MLP + "linear_fc1.layer_norm_bias", (Source(_HF + "ln_2.bias", ("hidden",)),)),
    Weight(MLP + "linear_fc1.weight", (Source(_HF + "mlp.c_fc.weight", ("hidden", "ffn")),), TRANSPOSED),
    Weight(MLP + "linear_fc1.bias", (Source(_HF + "mlp.c_fc.bias", ("ffn",)),)),
    Weight(MLP + "linear_fc2.weight", (Source(_HF + "mlp.c_proj.weight", ("ffn", "hidden")),), TRANSPOSED),
    Weight(MLP + "linear_fc2.bias", (Source(_HF + "mlp.c_proj.bias", ("hidden",)),)),
)
_FINAL = (
    Weight("decoder.final_layernorm.weight", (Source("transformer.ln_f.weight", ("hidden",)),)),
    Weight("decoder.final_layernorm.bias", (Source("transformer.ln_f.bias", ("hidden",)),)),
)

FAMILY = Family(
    name="GPT-2",
    model_type="gpt2",
    policy_class="GPT2LMHeadModel",
    reward_class="GPT2ForSequenceClassification",
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    aliases={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    must_be_default={
        "scale_attn_weights": "scores that are not scaled",
        "scale_attn_by_inverse_layer_idx": "scores scaled by layer",
        "reorder_and_upcast_attn": "attention in another precision",
        "add_cross_attention": "attention to an encoder",
    },
    rules={
        "num_layers": size("n_layer"),
        "hidden_size": size("n_embd"),
        "ffn_hidden_size": Rule(
            read=lambda config: config["n_inner"] or 4 * config["n_embd"],
            write=lambda value, model: {"n_inner": value},
        ),
        "num_attention_heads": size("n_head"),
        **multi_head(hidden="n_embd", heads="n_head"),
        "vocab_size": size("vocab_size"),
        "max_position_embeddings": size("n_positions"),
        "position_embedding_type": fixed("learned_absolute"),
        **dict.fromkeys(ROPE_FIELDS, UNUSED),
        "window_size": fixed(None),
        "normalization": fixed("LayerNorm"),
        "norm_epsilon": size("layer_norm_epsilon"),
        "qk_layernorm": fixed(False),
        "hidden_act": activation({"gelu_tanh": "gelu_new", "gelu": "gelu"}, key="activation_function"),
        "gated_linear_unit": fixed(False),
        "add_bias_linear": fixed(True),
        "add_qkv_bias": UNUSED,
        "use_parallel_residual": fixed(False),
        "untie_embeddings_and_output_weights": OUTPUT_TIE,
    },
    constants={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    embedding=_EMBEDDING,
    layer=_LAYER,
    final=_FINAL,
    output=Weight("output_layer.weight", (Source("lm_head.weight", ("vocab", "hidden")),)),
    hf_layers="transformer.h",
    hf_final_norm="transformer.ln_f",
    prefix="transformer.",
    # The files of the hub also hold these masks.
    ignored=(".attn.bias", ".attn.masked_bias"),
)
