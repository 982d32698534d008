"""GPT-2: learned positions, LayerNorm, biases, and weights stored `[in, out]` (transformers' Conv1D)."""

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.config_json import multi_head_limits, read_activation, read_sizes, write_sizes
from megatron_brain.conversion.family import Family, Source, Weight, refuse
from megatron_brain.conversion.fusion import STACKED_QKV, TRANSPOSED, TRANSPOSED_STACKED_QKV

_ATTENTION = "decoder.layers.{layer}.self_attention."
_MLP = "decoder.layers.{layer}.mlp."
_HF = "transformer.h.{layer}."

_EMBEDDING = (
    Weight("embedding.word_embeddings.weight", (Source("transformer.wte.weight", ("vocab", "hidden")),)),
    Weight("embedding.position_embeddings.weight", (Source("transformer.wpe.weight", ("positions", "hidden")),)),
)
_LAYER = (
    Weight(_ATTENTION + "linear_qkv.layer_norm_weight", (Source(_HF + "ln_1.weight", ("hidden",)),)),
    Weight(_ATTENTION + "linear_qkv.layer_norm_bias", (Source(_HF + "ln_1.bias", ("hidden",)),)),
    Weight(
        _ATTENTION + "linear_qkv.weight",
        (Source(_HF + "attn.c_attn.weight", ("hidden", "qkv")),),
        TRANSPOSED_STACKED_QKV,
    ),
    Weight(_ATTENTION + "linear_qkv.bias", (Source(_HF + "attn.c_attn.bias", ("qkv",)),), STACKED_QKV),
    Weight(_ATTENTION + "linear_proj.weight", (Source(_HF + "attn.c_proj.weight", ("query", "hidden")),), TRANSPOSED),
    Weight(_ATTENTION + "linear_proj.bias", (Source(_HF + "attn.c_proj.bias", ("hidden",)),)),
    Weight(_MLP + "linear_fc1.layer_norm_weight", (Source(_HF + "ln_2.weight", ("hidden",)),)),
    Weight(_MLP + "linear_fc1.layer_norm_bias", (Source(_HF + "ln_2.bias", ("hidden",)),)),
    Weight(_MLP + "linear_fc1.weight", (Source(_HF + "mlp.c_fc.weight", ("hidden", "ffn")),), TRANSPOSED),
    Weight(_MLP + "linear_fc1.bias", (Source(_HF + "mlp.c_fc.bias", ("ffn",)),)),
    Weight(_MLP + "linear_fc2.weight", (Source(_HF + "mlp.c_proj.weight", ("ffn", "hidden")),), TRANSPOSED),
    Weight(_MLP + "linear_fc2.bias", (Source(_HF + "mlp.c_proj.bias", ("hidden",)),)),
)
_FINAL = (
    Weight("decoder.final_layernorm.weight", (Source("transformer.ln_f.weight", ("hidden",)),)),
    Weight("decoder.final_layernorm.bias", (Source("transformer.ln_f.bias", ("hidden",)),)),
)

_SIZES = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
}
_OTHER_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""Of sizes; transformers takes them first."""

_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}


def _from_hf(config: dict) -> dict:
    config |= {name: config[other] for other, name in _OTHER_NAMES.items() if config[other] is not None}
    refuse(
        "GPT-2",
        {
            "scale_attn_weights=false (scores that are not scaled)": not config["scale_attn_weights"],
            "scale_attn_by_inverse_layer_idx=true (scores scaled by layer)": config["scale_attn_by_inverse_layer_idx"],
            "reorder_and_upcast_attn=true (attention in another precision)": config["reorder_and_upcast_attn"],
            "add_cross_attention=true (attention to an encoder)": config["add_cross_attention"],
        },
    )
    sizes = read_sizes(config, _SIZES)
    return {
        **sizes,
        "ffn_hidden_size": config["n_inner"] or 4 * sizes["hidden_size"],
        "num_query_groups": sizes["num_attention_heads"],
        "kv_channels": sizes["hidden_size"] // sizes["num_attention_heads"],
        "hidden_act": read_activation("GPT-2", config["activation_function"], allowed=_ACTIVATIONS),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def _to_hf(model: ModelConfig) -> dict:
    return {
        **write_sizes(model, _SIZES),
        "n_inner": model.ffn_hidden_size,
        "activation_function": _ACTIVATIONS[model.hidden_act],
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": model.init_method_std,
    }


def _limits(model: ModelConfig) -> dict[str, bool]:
    return {
        f"hidden_act={model.hidden_act}": model.hidden_act not in _ACTIVATIONS,
        **multi_head_limits(model),
    }


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
        **dict.fromkeys(_OTHER_NAMES),
    },
    fixed={
        "position_embedding_type": "learned_absolute",
        "window_size": None,
        "normalization": "LayerNorm",
        "qk_layernorm": False,
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "use_parallel_residual": False,
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    limits=_limits,
    embedding=_EMBEDDING,
    layer=_LAYER,
    final=_FINAL,
    output=Weight("output_layer.weight", (Source("lm_head.weight", ("vocab", "hidden")),)),
    reward_head=Weight("reward_head.weight", (Source("score.weight", ("label", "hidden")),)),
    hf_layers="transformer.h",
    hf_final_norm="transformer.ln_f",
    prefix="transformer.",
    # Masks, which the files of the hub hold.
    ignored=(".attn.bias", ".attn.masked_bias"),
)
