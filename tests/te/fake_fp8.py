"""Adds kernels of Transformer Engine's own FP8 tensors, in plain torch, to `fake_te`: for `delayed` and `tensorwise`.

A tensor is rounded to FP8 as `(x * scale).clamp(-max, max).to(fp8)`, which equals Transformer Engine's reference
quantizer bit for bit. Products of rounded operands are in float32. Transformer Engine's own Python decides when scales
move.
"""

from collections.abc import Sequence

import fake_te
import torch
from torch import Tensor

_OUT_DTYPES = {4: torch.float32, 6: torch.bfloat16}


def install() -> None:
    """Add the kernels to the extension that `fake_te.import_without_extension` puts in place later."""
    extension = fake_te._Extension
    plain_gemm, plain_norm = extension.generic_gemm, extension.rmsnorm_fwd

    def generic_gemm(a: Tensor, transpose_a: bool, b: Tensor, *options: object, **names: object) -> tuple:
        result, *others = plain_gemm(_in_full(a), transpose_a, _in_full(b), *options, **names)
        return result.to(_OUT_DTYPES.get(options[3], result.dtype)), *others

    def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: None, quantizer: object, *options: object) -> tuple:
        result, *others = plain_norm(x, weight, eps, out, None, *options)
        return (result if quantizer is None else quantizer(result)), *others

    for kernel in (generic_gemm, rmsnorm_fwd, quantize, fp8_transpose, compute_amax):
        setattr(extension, kernel.__name__, staticmethod(kernel))
    extension.fused_amax_and_scale_update_after_reduction = staticmethod(move_scales)
    extension.multi_tensor_compute_scale_and_scale_inv = staticmethod(compute_scales)
    extension.create_empty_quantized_tensor = staticmethod(make_empty)


def _in_full(operand: Tensor) -> Tensor:
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    return operand.dequantize(dtype=torch.float32) if isinstance(operand, QuantizedTensorStorage) else operand


def quantize(tensor: Tensor, quantizer: object, out: object = None, noop: Tensor | None = None) -> object:
    """Round into `out` or a new tensor, as the kernel does. Delayed scaling keeps the maximum since it was last 0."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    assert noop is None
    dtype = TE_DType_To_Torch[quantizer.dtype]
    largest, amax = torch.finfo(dtype).max, tensor.detach().abs().amax().float()
    if isinstance(quantizer, Float8Quantizer):
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale
    else:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(
                amax, op=torch.distributed.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group()
            )
        scale = torch.where(amax > 0, largest / amax, 1.0)
    data = (tensor.detach().float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    if out is None:
        out = quantizer.create_tensor_from_data(data, fake_dtype=tensor.dtype, internal=quantizer.internal)
    else:
        out._data.copy_(data)
    out._scale_inv.copy_((1 / scale).reshape(out._scale_inv.shape))
    out._transpose_invalid = True
    if quantizer.columnwise_usage:
        out._create_transpose()
    return out


def make_empty(
    quantizer: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> object:
    """A tensor to be filled, which the gathering of sequence parallelism needs."""
    data = torch.empty(shape, dtype=torch.uint8)
    return quantizer.create_tensor_from_data(data, fake_dtype=dtype, internal=quantizer.internal)


def fp8_transpose(data: Tensor, dtype: object, out: Tensor | None = None) -> Tensor:
    """`[..., columns]` to `[columns, ...]`."""
    result = data.movedim(-1, 0).contiguous()
    return result if out is None else out.copy_(result)


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.abs().amax())


def compute_scales(
    chunk_size: int,
    overflow: Tensor,
    lists: Sequence[list[Tensor]],
    largest: float,
    powers_of_two: bool,
    epsilon: float,
) -> None:
    """Scales and their inverses from maxima."""
    assert not powers_of_two and not epsilon
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(torch.where(amax > 0, largest / amax, 1.0))
        inverse.copy_(1 / scale)


def move_scales(
    maxima: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: int, margin: int
) -> None:
    """Compute new scales with the latest maxima. These become the last entry of the history; the first becomes 0."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    largest = torch.finfo(TE_DType_To_Torch[dtype]).max
    for latest, history, scale in zip(maxima.split([len(each) for each in scales]), histories, scales, strict=True):
        amax = torch.maximum(history.amax(0), latest) if algorithm == "max" else latest.clone()
        history.copy_(torch.cat([history[1:], latest[None]]))
        history[0] = 0
        known = (amax > 0) & amax.isfinite()
        scale.copy_(torch.where(known, largest / amax / 2**margin, scale))
