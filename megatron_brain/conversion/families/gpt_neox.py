"""GPT-NeoX and Pythia: LayerNorm, biases, rotation of a share of the channels, attention and MLP side by side."""

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.config_json import (
    ROPE_DEFAULTS,
    multi_head_limits,
    read_activation,
    read_rope,
    read_sizes,
    write_rope,
    write_sizes,
)
from megatron_brain.conversion.family import Family, Source, Weight, refuse

_ATTENTION = "decoder.layers.{layer}.self_attention."
_MLP = "decoder.layers.{layer}.mlp."
_HF = "gpt_neox.layers.{layer}."

_EMBEDDING = (Weight("embedding.word_embeddings.weight", (Source("gpt_neox.embed_in.weight", ("vocab", "hidden")),)),)
_LAYER = (
    Weight(_ATTENTION + "linear_qkv.layer_norm_weight", (Source(_HF + "input_layernorm.weight", ("hidden",)),)),
    Weight(_ATTENTION + "linear_qkv.layer_norm_bias", (Source(_HF + "input_layernorm.bias", ("hidden",)),)),
    # Query, key and value of each head together: what ours is where every head has its own key.
    Weight(_ATTENTION + "linear_qkv.weight", (Source(_HF + "attention.query_key_value.weight", ("qkv", "hidden")),)),
    Weight(_ATTENTION + "linear_qkv.bias", (Source(_HF + "attention.query_key_value.bias", ("qkv",)),)),
    Weight(_ATTENTION + "linear_proj.weight", (Source(_HF + "attention.dense.weight", ("hidden", "query")),)),
    Weight(_ATTENTION + "linear_proj.bias", (Source(_HF + "attention.dense.bias", ("hidden",)),)),
    Weight(_MLP + "linear_fc1.layer_norm_weight", (Source(_HF + "post_attention_layernorm.weight", ("hidden",)),)),
    Weight(_MLP + "linear_fc1.layer_norm_bias", (Source(_HF + "post_attention_layernorm.bias", ("hidden",)),)),
    Weight(_MLP + "linear_fc1.weight", (Source(_HF + "mlp.dense_h_to_4h.weight", ("ffn", "hidden")),)),
    Weight(_MLP + "linear_fc1.bias", (Source(_HF + "mlp.dense_h_to_4h.bias", ("ffn",)),)),
    Weight(_MLP + "linear_fc2.weight", (Source(_HF + "mlp.dense_4h_to_h.weight", ("hidden", "ffn")),)),
    Weight(_MLP + "linear_fc2.bias", (Source(_HF + "mlp.dense_4h_to_h.bias", ("hidden",)),)),
)
_FINAL = (
    Weight("decoder.final_layernorm.weight", (Source("gpt_neox.final_layer_norm.weight", ("hidden",)),)),
    Weight("decoder.final_layernorm.bias", (Source("gpt_neox.final_layer_norm.bias", ("hidden",)),)),
)

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "layer_norm_eps",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def _from_hf(config: dict) -> dict:
    sizes = read_sizes(config, _SIZES)
    usual_head, head = sizes["hidden_size"] // sizes["num_attention_heads"], config["head_dim"]
    refuse(
        "GPT-NeoX",
        {
            "attention_bias=false (no biases in the attention)": not config["attention_bias"],
            # transformers' model reads it for its rotary positions alone.
            f"head_dim={head} (rotary positions of another size than a head's)": head not in (None, usual_head),
        },
    )
    # The family has names of its own for these two, and transformers reads no others.
    rope = {**config, "rope_theta": config["rotary_emb_base"], "partial_rotary_factor": config["rotary_pct"]}
    return {
        **sizes,
        "num_query_groups": sizes["num_attention_heads"],
        "kv_channels": usual_head,
        **read_rope("GPT-NeoX", rope, partial=True),
        "hidden_act": read_activation("GPT-NeoX", config["hidden_act"], allowed=_ACTIVATIONS),
        "use_parallel_residual": config["use_parallel_residual"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def _to_hf(model: ModelConfig) -> dict:
    rope = write_rope(model)
    return {
        **write_sizes(model, _SIZES),
        "rotary_emb_base": model.rotary_base,
        "rotary_pct": model.rotary_percent,
        "rope_scaling": rope["rope_scaling"],
        "rope_parameters": {**rope["rope_parameters"], "partial_rotary_factor": model.rotary_percent},
        "hidden_act": _ACTIVATIONS[model.hidden_act],
        "use_parallel_residual": model.use_parallel_residual,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "classifier_dropout": 0.0,
        "initializer_range": model.init_method_std,
    }


def _limits(model: ModelConfig) -> dict[str, bool]:
    return {
        f"hidden_act={model.hidden_act}": model.hidden_act not in _ACTIVATIONS,
        **multi_head_limits(model),
    }


FAMILY = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    policy_class="GPTNeoXForCausalLM",
    reward_class="GPTNeoXForSequenceClassification",
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "head_dim": None,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        **ROPE_DEFAULTS,
    },
    fixed={
        "position_embedding_type": "rope",
        "window_size": None,
        "normalization": "LayerNorm",
        "qk_layernorm": False,
        "gated_linear_unit": False,
        "add_bias_linear": True,
    },
    from_hf=_from_hf,
    to_hf=_to_hf,
    limits=_limits,
    embedding=_EMBEDDING,
    layer=_LAYER,
    final=_FINAL,
    # transformers 5 calls it lm_head, and embed_out in files.
    output=Weight("output_layer.weight", (Source("embed_out.weight", ("vocab", "hidden")),)),
    reward_head=Weight("reward_head.weight", (Source("score.weight", ("label", "hidden")),)),
    hf_layers="gpt_neox.layers",
    hf_final_norm="gpt_neox.final_layer_norm",
    prefix="gpt_neox.",
    # Masks and frequencies, which the files of Pythia hold.
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
