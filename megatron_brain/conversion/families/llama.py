"""Llama 2, 3, 3.1 and 3.2, SmolLM2 and all that say `LlamaForCausalLM`."""

import dataclasses

from megatron_brain.conversion.config_json import size
from megatron_brain.conversion.llama_like import llama_like

FAMILY = llama_like(
    name="Llama",
    model_type="llama",
    policy_class="LlamaForCausalLM",
    reward_class="LlamaForSequenceClassification",
    defaults={
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    },
    must_be_default={
        "attention_bias": "biases in the attention",
        "mlp_bias": "biases in the feed-forward",
        "sliding_window": "attention over a window",
    },
    rules={
        # transformers refuses other sizes, also where head_dim is given.
        "hidden_size": dataclasses.replace(
            size("hidden_size"),
            allows=lambda value, model: value % model.num_attention_heads == 0,
            because=", which is not a multiple of num_attention_heads={num_attention_heads}",
        ),
    },
    constants={"attention_bias": False, "mlp_bias": False},
)
