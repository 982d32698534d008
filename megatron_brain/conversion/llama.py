"""The Llama family: Llama 2 and 3, SmolLM2 and all that say `LlamaForCausalLM`, as far as GPTModel expresses them."""

from megatron_brain.config.errors import ConfigError
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.family import GATE_UP, QKV, Family, Source, Weight

_LAYER = "model.layers.{layer}."

_TRUNK = (
    Weight("embedding.word_embeddings.weight", (Source("model.embed_tokens.weight", ("vocab", "hidden")),)),
    Weight(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        (Source(_LAYER + "input_layernorm.weight", ("hidden",)),),
    ),
    Weight(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            Source(_LAYER + "self_attn.q_proj.weight", ("query", "hidden")),
            Source(_LAYER + "self_attn.k_proj.weight", ("key_value", "hidden")),
            Source(_LAYER + "self_attn.v_proj.weight", ("key_value", "hidden")),
        ),
        QKV,
    ),
    Weight(
        "decoder.layers.self_attention.linear_proj.weight",
        (Source(_LAYER + "self_attn.o_proj.weight", ("hidden", "query")),),
    ),
    Weight(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        (Source(_LAYER + "post_attention_layernorm.weight", ("hidden",)),),
    ),
    Weight(
        "decoder.layers.mlp.linear_fc1.weight",
        (
            Source(_LAYER + "mlp.gate_proj.weight", ("ffn", "hidden")),
            Source(_LAYER + "mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        GATE_UP,
    ),
    Weight(
        "decoder.layers.mlp.linear_fc2.weight",
        (Source(_LAYER + "mlp.down_proj.weight", ("hidden", "ffn")),),
    ),
    Weight("decoder.final_layernorm.weight", (Source("model.norm.weight", ("hidden",)),)),
)


def architecture_from_hf(config: dict) -> dict:
    """Sizes of the model, keys of ARCHITECTURE_FIELDS. What config.json leaves out is transformers' default.

    Raises:
        ConfigError: a size is missing, or the model has what GPTModel as built here cannot express.
    """
    missing = [key for key in _SIZES.values() if config.get(key) is None]
    if missing:
        raise ConfigError(f"config.json has no {', '.join(missing)}: the model's sizes are not known")
    _refuse_unsupported(config)
    heads = config["num_attention_heads"]
    return {
        **{ours: config[theirs] for ours, theirs in _SIZES.items()},
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "position_embedding_type": "rope",
        "rotary_base": _rotary_base(config),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


def hf_config(model: ModelConfig) -> dict:
    """What config.json says of the architecture.

    Raises:
        ConfigError: transformers' Llama cannot have these sizes, or these positions.
    """
    if model.position_embedding_type == "learned_absolute":
        raise ConfigError(
            f"position_embedding_type={model.position_embedding_type}: transformers' LlamaConfig has rotary positions "
            "only, and no place for the position embedding's weights"
        )
    if model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"hidden_size={model.hidden_size} is not a multiple of num_attention_heads={model.num_attention_heads}: "
            "LlamaConfig of transformers does not allow it"
        )
    return {
        "model_type": "llama",
        **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        # transformers 5 reads the second, transformers 4 and other engines the first.
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
    }


_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}


def _rope(config: dict) -> dict:
    """Rotary settings: `rope_parameters` of transformers 5, else `rope_scaling` of transformers 4."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rotary_base(config: dict) -> float:
    return float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _refuse_unsupported(config: dict) -> None:
    rope = _rope(config)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    activation = config.get("hidden_act", "silu")
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    found = {
        f"rope_type={scaling!r} (scaled rotary positions)": scaling != "default",
        "rope_parameters by layer type": any(isinstance(value, dict) for value in rope.values()),
        f"partial_rotary_factor={rotated} (only some channels rotated)": rotated != 1.0,
        "attention_bias=true (biases in the attention)": config.get("attention_bias"),
        "mlp_bias=true (biases in the feed-forward)": config.get("mlp_bias"),
        f"hidden_act={activation!r} (an activation other than silu)": activation not in ("silu", "swish"),
        f"sliding_window={config.get('sliding_window')} (attention over a window)": config.get("sliding_window"),
        "quantization_config (quantised weights)": config.get("quantization_config"),
    }
    unsupported = [what for what, is_so in found.items() if is_so]
    if unsupported:
        raise ConfigError(
            f"config.json has {'; '.join(unsupported)}: not supported for Llama models, and never ignored"
        )


LLAMA = Family(
    name="Llama",
    policy_class="LlamaForCausalLM",
    reward_class="LlamaForSequenceClassification",
    architecture=architecture_from_hf,
    hf_config=hf_config,
    trunk=_TRUNK,
    output=Weight("output_layer.weight", (Source("lm_head.weight", ("vocab", "hidden")),)),
    reward_head=Weight("reward_head.weight", (Source("score.weight", ("label", "hidden")),)),
    # A buffer that transformers saved until 2023.
    ignored=("rotary_emb.inv_freq",),
)
