"""Qwen 3 (dense): Llama, with an RMSNorm over each head of queries and keys, and a window in some layers."""

from megatron_brain.conversion.config_json import WINDOW_BY_LAYER, WINDOW_DEFAULTS, fixed, size
from megatron_brain.conversion.family import ATTENTION, Source, Weight
from megatron_brain.conversion.llama_like import LAYER, llama_like

_HF = "model.layers.{layer}.self_attn."

FAMILY = llama_like(
    name="Qwen3",
    model_type="qwen3",
    policy_class="Qwen3ForCausalLM",
    reward_class="Qwen3ForSequenceClassification",
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        **WINDOW_DEFAULTS,
    },
    must_be_default={"attention_bias": "biases in the attention"},
    rules={"kv_channels": size("head_dim"), "window_size": WINDOW_BY_LAYER, "qk_layernorm": fixed(True)},
    constants={"attention_bias": False},
    layer=(
        *LAYER,
        Weight(ATTENTION + "q_layernorm.weight", (Source(_HF + "q_norm.weight", ("head",)),)),
        Weight(ATTENTION + "k_layernorm.weight", (Source(_HF + "k_norm.weight", ("head",)),)),
    ),
)
