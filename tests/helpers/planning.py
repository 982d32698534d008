"""Machines and models that are small enough to calculate by hand."""

import math

from megatron_brain.config.model import ModelConfig
from megatron_brain.models.architecture import resolve
from megatron_brain.planning.machine import Machine

RATES = (
    "fp8_flops",
    "bf16_flops",
    "fp32_flops",
    "memory_bandwidth",
    "node_bandwidth",
    "network_bandwidth",
    "host_bandwidth",
    "storage_bandwidth",
)


def ideal_machine(**limits: float) -> Machine:
    """A machine on which only what `limits` names takes time. At a rate of 1, a count is a number of seconds."""
    rates = dict.fromkeys(RATES, math.inf) | {"efficiency": 1.0, "memory_bytes": 2**40} | limits
    return Machine(name="ideal", **rates)


def small_model(**changes: object) -> ModelConfig:
    """A model with 2 attention heads of 4 channels, 1 key-value head and no padding of the vocabulary."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "vocab_size": 32,
        "max_position_embeddings": 4096,
        "untie_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 1,
    }
    return resolve(ModelConfig(**sizes | changes), None, "the test")
