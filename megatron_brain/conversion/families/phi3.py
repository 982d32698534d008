"""Phi-3 and Phi-4 with plain rotary positions: Llama, with fused queries, keys and values and a fused gate and up."""

import dataclasses

from megatron_brain.conversion.config_json import UNLISTED_HEAD_SIZE, rope, same, size
from megatron_brain.conversion.family import ATTENTION, MLP, Source, Weight, replaced
from megatron_brain.conversion.fusion import STACKED_QKV
from megatron_brain.conversion.llama_like import LAYER, llama_like

_HF = "model.layers.{layer}."

FAMILY = llama_like(
    name="Phi-3",
    model_type="phi3",
    policy_class="Phi3ForCausalLM",
    reward_class="Phi3ForSequenceClassification",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    rules={
        "kv_channels": UNLISTED_HEAD_SIZE,
        "max_position_embeddings": dataclasses.replace(
            size("max_position_embeddings"),
            write=lambda value, model: dict.fromkeys(
                ("max_position_embeddings", "original_max_position_embeddings"), value
            ),
        ),
        **rope(types=("default",), partial=True),
        "window_size": same("sliding_window"),
    },
    constants={"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    layer=replaced(
        LAYER,
        Weight(
            ATTENTION + "linear_qkv.weight",
            (Source(_HF + "self_attn.qkv_proj.weight", ("qkv", "hidden")),),
            STACKED_QKV,
        ),
        # The gate stands above, as it does in ours.
        Weight(MLP + "linear_fc1.weight", (Source(_HF + "mlp.gate_up_proj.weight", ("gate_and_up", "hidden")),)),
    ),
)
