"""Rotary positions (https://arxiv.org/abs/2104.09864): their frequencies, and the rotation of queries and keys."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_brain.config.model import ModelConfig


def scale_frequencies(frequencies: Tensor, model: ModelConfig) -> Tensor:
    """Frequencies `[r/2]` with Llama 3.1's scaling, as transformers computes it (`rope_type` llama3).

    megatron-core's own scaling lets us set the factor only and fixes the other three numbers.
    """
    factor, original = model.rope_scaling_factor, model.rope_original_max_position_embeddings
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if factor == 1.0:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    is_short, is_long = wavelength < original / high, wavelength > original / low
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    return torch.where(is_short, frequencies, torch.where(is_long, frequencies / factor, between))


@dataclass
class Rotated(PackedSeqParams):
    """A layout, with the rotation of queries and keys by their positions that is done before its attention.

    megatron-core could rotate too, but it takes about three times as many passes over memory, and computes cosine and
    sine again in every layer. cos: `[T, 1, dim]`, 1 for channels that are not rotated. sin: `[T, 1, r]`, for the first
    r channels, which are rotated. In the dtype of queries and keys, one copy serves the backward pass of all layers.
    """

    layout: PackedSeqParams = field(kw_only=True)
    cos: Tensor = field(kw_only=True)
    sin: Tensor = field(kw_only=True)

    @classmethod
    def by_positions(
        cls,
        layout: PackedSeqParams,
        positions: Tensor,
        frequencies: Tensor,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "Rotated":
        """The layout, with a rotation of each token by its own position `[T]` at the frequencies `[r/2]`.

        `dtype` is the dtype of queries and keys; angles are computed in float32.
        """
        angles = positions[:, None, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos = F.pad(angles.cos(), (0, dim - angles.size(-1)), value=1.0)
        return cls(layout=layout, cos=cos.to(dtype), sin=angles.sin().to(dtype))

    def rotate(self, tensor: Tensor) -> Tensor:
        """Rotate queries or keys `[T, heads, dim]`: channel i with channel i + r/2, for i < r/2."""
        return _Rotate.apply(tensor, self.cos.to(tensor.dtype), self.sin.to(tensor.dtype))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(tensor, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Each operation rounds, as in transformers, so that in bfloat16 the results have the same bits as there.
    rotated = sin.size(-1)
    half = rotated // 2
    out = tensor * cos
    out[..., :half] -= tensor[..., half:rotated] * sin[..., :half]
    out[..., half:rotated] += tensor[..., :half] * sin[..., half:]
    return out
