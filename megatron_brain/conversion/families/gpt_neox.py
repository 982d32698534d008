"""GPT-NeoX and Pythia: LayerNorm, biases, rotation of a share of the channels, attention and MLP side by side."""

import dataclasses

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.config_json import (
    OUTPUT_TIE,
    ROPE_DEFAULTS,
    UNUSED,
    activation,
    fixed,
    multi_head,
    rope,
    same,
    size,
    write_rope,
)
from megatron_brain.conversion.family import ATTENTION, MLP, Family, Source, Weight

_HF = "gpt_neox.layers.{layer}."

_EMBEDDING = (Weight("embedding.word_embeddings.weight", (Source("gpt_neox.embed_in.weight", ("vocab", "hidden")),)),)
_LAYER = (
    Weight(ATTENTION + "linear_qkv.layer_norm_weight", (Source(_HF + "input_layernorm.weight", ("hidden",)),)),
    Weight(ATTENTION + "linear_qkv.layer_norm_bias", (Source(_HF + "input_layernorm.bias", ("hidden",)),)),
    # Query, key and value of each head stand together. Ours do too where every head has its own key.
    Weight(ATTENTION + "linear_qkv.weight", (Source(_HF + "attention.query_key_value.weight", ("qkv", "hidden")),)),
    Weight(ATTENTION + "linear_qkv.bias", (Source(_HF + "attention.query_key_value.bias", ("qkv",)),)),
    Weight(ATTENTION + "linear_proj.weight", (Source(_HF + "attention.dense.weight", ("hidden", "query")),)),
    Weight(ATTENTION + "linear_proj.bias", (Source(_HF + "attention.dense.bias", ("hidden",)),)),
    Weight(MLP + "linear_fc1.layer_norm_weight", (Source(_HF + "post_attention_layernorm.weight", ("hidden",)),)),
    Weight(MLP + "linear_fc1.layer_norm_bias", (Source(_HF + "post_attention_layernorm.bias", ("hidden",)),)),
    Weight(MLP + "linear_fc1.weight", (Source(_HF + "mlp.dense_h_to_4h.weight", ("ffn", "hidden")),)),
    Weight(MLP + "linear_fc1.bias", (Source(_HF + "mlp.dense_h_to_4h.bias", ("ffn",)),)),
    Weight(MLP + "linear_fc2.weight", (Source(_HF + "mlp.dense_4h_to_h.weight", ("hidden", "ffn")),)),
    Weight(MLP + "linear_fc2.bias", (Source(_HF + "mlp.dense_4h_to_h.bias", ("hidden",)),)),
)
_FINAL = (
    Weight("decoder.final_layernorm.weight", (Source("gpt_neox.final_layer_norm.weight", ("hidden",)),)),
    Weight("decoder.final_layernorm.bias", (Source("gpt_neox.final_layer_norm.bias", ("hidden",)),)),
)


def _write_rope(model: ModelConfig) -> dict:
    """The family has keys of its own for the base and the share, and its default share is not 1."""
    written = write_rope(model)
    return {
        "rotary_emb_base": model.rotary_base,
        "rotary_pct": model.rotary_percent,
        "rope_scaling": written["rope_scaling"],
        "rope_parameters": {**written["rope_parameters"], "partial_rotary_factor": model.rotary_percent},
    }


def _other_rotation(config: dict) -> dict[str, bool]:
    """transformers' model uses `head_dim` for its rotary positions alone."""
    head, usual = config["head_dim"], config["hidden_size"] // config["num_attention_heads"]
    return {f"head_dim={head} (rotary positions of another size than a head's)": head not in (None, usual)}


_HEADS = multi_head(hidden="hidden_size", heads="num_attention_heads")

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
    must_be_default={"attention_bias": "no biases in the attention"},
    rules={
        "num_layers": size("num_hidden_layers"),
        "hidden_size": size("hidden_size"),
        "ffn_hidden_size": size("intermediate_size"),
        "num_attention_heads": size("num_attention_heads"),
        "num_query_groups": _HEADS["num_query_groups"],
        "kv_channels": dataclasses.replace(_HEADS["kv_channels"], refused=_other_rotation),
        "vocab_size": size("vocab_size"),
        "max_position_embeddings": size("max_position_embeddings"),
        "position_embedding_type": fixed("rope"),
        **rope(theta="rotary_emb_base", percent="rotary_pct", partial=True, write=_write_rope),
        "window_size": fixed(None),
        "normalization": fixed("LayerNorm"),
        "norm_epsilon": size("layer_norm_eps"),
        "qk_layernorm": fixed(False),
        "hidden_act": activation({"gelu": "gelu", "gelu_tanh": "gelu_new"}),
        "gated_linear_unit": fixed(False),
        "add_bias_linear": fixed(True),
        "add_qkv_bias": UNUSED,
        "use_parallel_residual": same("use_parallel_residual"),
        "untie_embeddings_and_output_weights": OUTPUT_TIE,
    },
    constants={"attention_bias": True, "attention_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.0},
    embedding=_EMBEDDING,
    layer=_LAYER,
    final=_FINAL,
    # transformers 5 calls it lm_head in memory and embed_out in files.
    output=Weight("output_layer.weight", (Source("embed_out.weight", ("vocab", "hidden")),)),
    hf_layers="gpt_neox.layers",
    hf_final_norm="gpt_neox.final_layer_norm",
    prefix="gpt_neox.",
    # The files of Pythia also hold these masks and frequencies.
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
