"""Mistral 7B and all that say `MistralForCausalLM`: Llama, and in some versions attention over a window."""

from megatron_brain.conversion.config_json import same
from megatron_brain.conversion.llama_like import llama_like

FAMILY = llama_like(
    name="Mistral",
    model_type="mistral",
    policy_class="MistralForCausalLM",
    reward_class="MistralForSequenceClassification",
    defaults={
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    rules={"window_size": same("sliding_window")},
)
