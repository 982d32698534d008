"""Lets Transformer Engine's own Python run on a CPU. Use a separate process: `claim_cuda` patches torch globally.

Transformer Engine is Python modules over a compiled extension. Plain torch replaces the few functions of the extension
that a training step in float32 or bfloat16 calls, and torch.cuda says that there is a device. So parameters, their
names, layer construction, autograd functions, recipes of FP8 and the fused Adam are Transformer Engine's own. Kernels
are not tested.
"""

import enum
import functools
import itertools
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Transformer Engine compares the members of these enumerations with its own, or uses them as places in a list.
_DTYPES = {
    "kByte": 0,
    "kInt32": 2,
    "kFloat32": 4,
    "kFloat16": 5,
    "kBFloat16": 6,
    "kFloat8E4M3": 7,
    "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}
_ATTENTIONS = {
    "NVTE_No_Backend": -1,
    "NVTE_F16_arbitrary_seqlen": 1,
    "NVTE_FP8": 2,
}
_FP8_FORWARD = [f"GEMM{i}_{tensor}" for i in (1, 2, 3) for tensor in ("INPUT", "WEIGHT", "OUTPUT")]
_FP8_BACKWARD = [f"GRAD_{tensor}{i}" for i in (1, 2, 3) for tensor in ("OUTPUT", "INPUT")]


def import_without_extension() -> None:
    """Import Transformer Engine with the fake in place of its extension, before megatron-core looks for it."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    # Softmax is in plain torch: the fused kernels are for longer sequences than most of ours.
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    extension = _Extension("transformer_engine_torch")
    sys.modules["transformer_engine_torch"] = extension
    with warnings.catch_warnings():
        # It warns that it found no compiled extension.
        warnings.simplefilter("ignore", RuntimeWarning)
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = lambda framework: None
    from transformer_engine.pytorch import cpp_extensions, distributed

    # This module imports the extension's names with a star, which finds none in the fake.
    cpp_extensions.__getattr__ = functools.partial(getattr, extension)
    # Recomputation of activations saves the state of the device's generator, which is here the CPU's.
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("convert_thd_to_bshd", "convert_bshd_to_thd"):
        torch.library.register_kernel(f"te_kv_cache::{name}", "cpu", getattr(extension, name))


def claim_cuda() -> None:
    """Make torch say that there is an H100. Call this after the process has chosen to work on the CPU."""
    properties = types.SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda *args: properties
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.Tensor.is_cuda = property(lambda tensor: True)


class _NotThere(type):
    """A class, an enumeration or a function of the extension that must exist and is not called."""

    _numbers = itertools.count()

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, next(_NotThere._numbers))
        return getattr(cls, name)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} is not faked")


class _Extension(types.ModuleType):
    DType = enum.IntEnum("DType", _DTYPES)
    NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", _ATTENTIONS)
    FP8FwdTensors = enum.IntEnum("FP8FwdTensors", _FP8_FORWARD, start=0)
    FP8BwdTensors = enum.IntEnum("FP8BwdTensors", _FP8_BACKWARD, start=0)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _NotThere(name, (), {}))
        return getattr(self, name)

    @staticmethod
    def get_cudnn_version() -> int:
        return 92400

    @staticmethod
    def get_cublasLt_version() -> int:  # noqa: N802
        return 130100

    @staticmethod
    def ubuf_built_with_mpi() -> bool:
        return False

    @classmethod
    def get_fused_attn_backend(cls, *args: object, **kwargs: object) -> tuple[enum.IntEnum, str]:
        """Say that there is none, so that the attention in plain torch is used."""
        return cls.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "not faked"

    @staticmethod
    def generic_gemm(
        a: Tensor,
        transpose_a: bool,
        b: Tensor,
        transpose_b: bool,
        out: Tensor | None,
        quantizer: None,
        out_dtype: int | None,
        bias: Tensor | None,
        bias_dtype: int,
        gelu: bool,
        gelu_input: None,
        grad: bool,
        workspace: Tensor,
        workspace_size: int,
        accumulate: bool,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """`out = b @ a`, because the kernel is column-major; `a` and `b` may be transposed. The bias is added. With
        `grad`, `b` is the gradient of the output, and the gradient of the bias is the second result instead."""
        assert quantizer is None and not gelu
        rows = b.reshape(-1, b.shape[-1])
        a = a.reshape(-1, a.shape[-1])
        result = (rows.T if transpose_b else rows) @ (a.T if transpose_a else a)
        if not transpose_b:
            result = result.view(*b.shape[:-1], -1)
        if bias is not None and not grad:
            result = result + bias
        if out is not None:
            result = out.add_(result) if accumulate else out.copy_(result)
        return result, rows.sum(0) if bias is not None and grad else None, None, None

    @staticmethod
    def rmsnorm_fwd(
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor | None,
        quantizer: None,
        dtype: int,
        margin: int,
        plus_one: bool,
    ) -> tuple[Tensor, None, Tensor]:
        assert out is None and quantizer is None and not plus_one
        scale = torch.rsqrt(x.float().square().mean(-1) + eps)
        return (x.float() * scale[..., None] * weight.float()).to(x.dtype), None, scale

    @staticmethod
    def rmsnorm_bwd(
        grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        normed, weighted = x.float() * scale[..., None], grad.float() * weight.float()
        of_x = scale[..., None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
        return of_x.to(x.dtype), (grad.float() * normed).sum(0).to(weight.dtype)

    @staticmethod
    def layernorm_fwd(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        out: Tensor | None,
        quantizer: None,
        dtype: int,
        margin: int,
        plus_one: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert out is None and quantizer is None and not plus_one
        result, mean, scale = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        return result, mean.view(-1), scale.view(-1)

    @staticmethod
    def layernorm_bwd(
        grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, margin: int, plus_one: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, scale = (each.view(*x.shape[:-1], 1) for each in (mean, scale))
        return torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, scale, weight, torch.zeros_like(weight), [True, True, True]
        )

    @staticmethod
    def bgrad_quantize(grad: Tensor, quantizer: Callable[[Tensor], object]) -> tuple[Tensor, object]:
        """Gradient of the bias, and gradient of the output in the quantizer's format."""
        return grad.reshape(-1, grad.shape[-1]).sum(0), quantizer(grad)

    @staticmethod
    def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, batch: int, max_length: int) -> Tensor:
        """Turn sequences laid end to end, `[t, h, d]`, into padded ones, `[b, s, h, d]`."""
        padded = tensor.new_zeros(batch, max_length, *tensor.shape[1:])
        for row, sequence in zip(padded, tensor.split(cu_seqlens.diff().tolist()), strict=True):
            row[: len(sequence)] = sequence
        return padded

    @staticmethod
    def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
        lengths = cu_seqlens.diff().tolist()
        assert sum(lengths) == total
        return torch.cat([row[:length] for row, length in zip(tensor, lengths, strict=True)])

    @staticmethod
    def multi_tensor_l2norm(
        chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], per_tensor: bool = False
    ) -> tuple[Tensor, None]:
        return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm().view(1), None

    @staticmethod
    def multi_tensor_scale(
        chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], scale: float | Tensor
    ) -> None:
        for source, target in zip(*lists, strict=True):
            target.copy_(source * scale)

    multi_tensor_scale_tensor = multi_tensor_scale

    @staticmethod
    def multi_tensor_adam(
        chunk_size: int,
        overflow: Tensor,
        lists: Sequence[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
        decoupled: int,
        bias_correction: int,
        weight_decay: float,
    ) -> None:
        """AdamW (https://arxiv.org/abs/1711.05101) over lists of gradients, weights and both moments."""
        assert decoupled and bias_correction
        for grad, weight, first, second in zip(*lists, strict=True):
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
            weight.sub_(lr * (update + weight_decay * weight))
