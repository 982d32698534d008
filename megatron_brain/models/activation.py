"""Activations of the feed-forward layer."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_brain.config.model import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""The functions by the values of `hidden_act`."""


def activation_module(model: ModelConfig) -> type["GatedSilu"] | None:
    """The module that computes the activation and its gate; None if megatron-core computes them with a function."""
    return GatedSilu if model.gated_linear_unit and model.hidden_act == "silu" else None


class GatedSilu(MegatronModule):
    """silu(gate) * up (https://arxiv.org/abs/2002.05202). It keeps only its input for the backward pass.

    megatron-core's unfused version keeps two more tensors of half the size, and takes about twice as long on a CPU.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """`[..., 2f]` to `[..., f]`."""
        return _GatedSilu.apply(gate_and_up)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        [gate_and_up] = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_and_up)
        of_gate, of_up = grads.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return grads
