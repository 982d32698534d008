"""Qwen 2 and 2.5: Llama, with biases of queries, keys and values, and a window in some layers."""

from megatron_brain.conversion.config_json import UNLISTED_HEAD_SIZE, WINDOW_BY_LAYER, WINDOW_DEFAULTS, fixed
from megatron_brain.conversion.family import ATTENTION, Source, Weight
from megatron_brain.conversion.fusion import QKV
from megatron_brain.conversion.llama_like import LAYER, llama_like

_HF = "model.layers.{layer}.self_attn."

FAMILY = llama_like(
    name="Qwen2",
    model_type="qwen2",
    policy_class="Qwen2ForCausalLM",
    reward_class="Qwen2ForSequenceClassification",
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        **WINDOW_DEFAULTS,
    },
    rules={"kv_channels": UNLISTED_HEAD_SIZE, "window_size": WINDOW_BY_LAYER, "add_qkv_bias": fixed(True)},
    layer=(
        *LAYER,
        Weight(
            ATTENTION + "linear_qkv.bias",
            (
                Source(_HF + "q_proj.bias", ("query",)),
                Source(_HF + "k_proj.bias", ("key_value",)),
                Source(_HF + "v_proj.bias", ("key_value",)),
            ),
            QKV,
        ),
    ),
)
