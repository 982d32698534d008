"""Emulates FP8 linear layers in plain PyTorch, to study on any device what rounding to FP8 does to a run.

The operands of a linear map's three products are rounded to FP8. Each operand is scaled as a whole by its own largest
magnitude ("current scaling", --fp8-recipe tensorwise; https://arxiv.org/abs/2209.05433 describes the formats):

    output          = input (e4m3)             x weight (e4m3)
    input gradient  = output gradient (e5m2)   x weight (e4m3)
    weight gradient = output gradient (e5m2)   x input (e4m3)

With --fp8-format e4m3 the output gradient is in e4m3 too. Sums are in float32; results have the type that the operands
had before rounding. Every number equals, bit for bit, what Transformer Engine's own reference of this recipe computes
on a CPU (`CurrentScalingQuantizerRef`, with powers of two off and epsilon 0). Real kernels add in another order.

Weights, their names, checkpoints and tensor parallelism are megatron-core's. As with Transformer Engine, each process
rounds and scales its own share of a tensor, so another tensor-parallel size gives other roundings. Sequences that
sequence parallelism splits are gathered before they are rounded, so all of their ranks use one scale.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.runtime.megatron_versions import mlp_submodules

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8. `codes * inverse_scale` is nearly the original matrix."""

    codes: Tensor
    inverse_scale: Tensor
    """Float32, with one element."""

    def transposed(self) -> "Quantized":
        """The transposed matrix, copied to be contiguous: the last bit of sums of few rows depends on the layout."""
        return Quantized(self.codes.t().contiguous(), self.inverse_scale)

    def dequantized(self) -> Tensor:
        """`codes * inverse_scale` in float32."""
        return self.codes.float().mul_(self.inverse_scale)


def quantize(matrix: Tensor, dtype: torch.dtype) -> Quantized:
    """Round `[m, k]` to the FP8 type, scaled so that the largest magnitude becomes the type's largest number.

    A matrix of zeros gets scale 1. A matrix that holds a NaN becomes NaN here; one that holds an infinity becomes NaN
    when it is multiplied. Both reach the loss or the gradient norm, where the guards find them.
    """
    values = matrix.float()
    largest = torch.stack(values.aminmax()).abs().max().view(1)
    scale = torch.div(torch.finfo(dtype).max, largest)  # `/` would multiply by the reciprocal.
    # An infinite scale means that the magnitudes are too small for a scale in float32.
    scale = torch.where(scale.isinf(), torch.finfo(matrix.dtype).max, scale)
    scale = torch.where(largest == 0, 1.0, scale)
    return Quantized((values * scale).to(dtype), scale.reciprocal())


def multiply(left: Quantized, right: Quantized, dtype: torch.dtype, *, bias: Tensor | None = None) -> Tensor:
    """`left [m, k] x right [k, n] + bias [n]`, summed in float32 and rounded to `dtype` at the end."""
    product = left.dequantized() @ right.dequantized()
    if bias is not None:
        product += bias
    return product.to(dtype)


def emulated_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, gradient_type: torch.dtype) -> Tensor:
    """`inputs [..., k] x weight [n, k]^T + bias [n]`. Here and in the backward pass, operands are rounded to FP8.

    Args:
        gradient_type: FP8 type that the gradient of the output is rounded to.
    """
    return _Linear.apply(inputs, weight, bias, gradient_type)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None, gradient_type: torch.dtype) -> Tensor:
        rounded, rounded_weight = quantize(inputs.reshape(-1, inputs.size(-1)), E4M3), quantize(weight, E4M3)
        ctx.save_for_backward(rounded.codes, rounded.inverse_scale, rounded_weight.codes, rounded_weight.inverse_scale)
        ctx.gradient_type, ctx.input_shape = gradient_type, inputs.shape
        return multiply(rounded, rounded_weight.transposed(), inputs.dtype, bias=bias).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, inverse_scale, weight_codes, inverse_weight_scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.size(-1))
        rounded = quantize(rows, ctx.gradient_type)
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = Quantized(weight_codes, inverse_weight_scale)
            grad_inputs = multiply(rounded, weight, grad.dtype).view(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            inputs = Quantized(codes, inverse_scale)
            grad_weight = multiply(rounded.transposed(), inputs, grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_inputs, grad_weight, grad_bias, None


class _Emulated:
    """Replaces the products of megatron-core's linear layers."""

    gradient_type: torch.dtype
    emulates_fp8 = True
    """Whether FP8 is emulated; models/fp8/state.py switches it off for some passes."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        **others: object,
    ) -> Tensor:
        """This rank's product, with the same communication as the function that it replaces."""
        if not self.emulates_fp8:
            others |= {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel}
            return super()._forward_impl(input, weight, bias=bias, tp_group=tp_group, **others)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return emulated_linear(input, weight, bias, self.gradient_type)


class HybridColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """Linear layer whose output rows are split over tensor-parallel ranks, with gradients in e5m2."""

    gradient_type = E5M2


class HybridRowParallelLinear(_Emulated, RowParallelLinear):
    """Linear layer whose input columns are split over tensor-parallel ranks, with gradients in e5m2."""

    gradient_type = E5M2


class E4M3ColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """Linear layer whose output rows are split over tensor-parallel ranks, with gradients in e4m3."""

    gradient_type = E4M3


class E4M3RowParallelLinear(_Emulated, RowParallelLinear):
    """Linear layer whose input columns are split over tensor-parallel ranks, with gradients in e4m3."""

    gradient_type = E4M3


_LINEARS = {
    "hybrid": (HybridColumnParallelLinear, HybridRowParallelLinear),
    "e4m3": (E4M3ColumnParallelLinear, E4M3RowParallelLinear),
}


def emulated_format(fp8: Fp8Config | None, layer: int, num_layers: int) -> str | None:
    """FP8 format that a layer emulates, or None. `layer` is its number in the whole model, from 0."""
    if fp8 is None or not fp8.fp8_emulate:
        return None
    start, end = fp8.layers_in_bf16
    return fp8.fp8_format if start <= layer < num_layers - end else None


def emulate_fp8(spec: ModuleSpec, fp8_format: str) -> None:
    """Make a `local` layer emulate FP8 in its four linear maps."""
    column, row = _LINEARS[fp8_format]
    attention, mlp = spec.submodules.self_attention.submodules, mlp_submodules(spec)
    attention.linear_qkv, attention.linear_proj = column, row
    mlp.linear_fc1, mlp.linear_fc2 = column, row
