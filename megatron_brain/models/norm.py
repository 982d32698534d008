"""Norms that may run sequence-parallel."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with megatron-core's constructor. Sequence-parallel ranks sum its gradient.

    megatron-core's own wrapper refuses `sequence_parallel`, although the attribute on the weight is all that is needed.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's LayerNorm with megatron-core's constructor. Sequence-parallel ranks sum its gradients."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
"""The norms by the values of `normalization`."""
