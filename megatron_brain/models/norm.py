"""Norms that may run sequence-parallel."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm under megatron-core's constructor, its gradient summed over sequence-parallel ranks.

    megatron-core's own wrapper of it refuses `sequence_parallel`; the attribute on the weight is all it takes.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's LayerNorm in the same way."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
"""By the values of `normalization`."""
