"""Core attention on PyTorch's scaled-dot-product attention, over packed sequences with shared prefixes."""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_brain.data.groups import Segment


@dataclass
class PackedLayout(PackedSeqParams):
    """Who attends to whom in a packed sequence; travels to the attention as megatron-core's packed_seq_params.

    `qkv_format` stays unset, so that megatron-core keeps `[T, 1, heads, dim]` and rotates by the table it is given.
    """

    segments: tuple[Segment, ...] = ()

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        """Attention of every segment to itself, causally, and to its prefix.

        Args:
            layer_number: global number of the layer, from 1.
            query: `[T, heads, dim]`. key, value: `[T, key_value_heads, dim]`.
            options: `scale` and `dropout_p` of the softmax.

        Returns:
            `[T, heads, dim]`.
        """
        parts: list[Tensor] = []
        for prefix, run in itertools.groupby(self.segments, key=lambda s: (s.prefix_start, s.prefix_length)):
            segments = list(run)
            if prefix[1]:
                parts += _attend_after_prefix(segments, query, key, value, **options)
            else:
                parts += [_attend_to_self(segment, query, key, value, **options) for segment in segments]
        return torch.cat(parts)


def _attend_to_self(segment: Segment, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    rows = slice(segment.start, segment.start + segment.length)
    out = scaled_dot_product_attention(query[None, rows], key[None, rows], value[None, rows], is_causal=True, **options)
    return out[0]


def _attend_after_prefix(segments: list[Segment], query: Tensor, key: Tensor, value: Tensor, **options) -> list[Tensor]:
    """Responses of one prompt in one call: each row of the batch is a response, padded at its end."""
    longest = max(segment.length for segment in segments)
    prefix = slice(segments[0].prefix_start, segments[0].prefix_start + segments[0].prefix_length)

    def rows(tensor: Tensor) -> Tensor:
        pieces = [F.pad(tensor[s.start : s.start + s.length], (0, 0, 0, 0, 0, longest - s.length)) for s in segments]
        return torch.stack(pieces)

    def after_prefix(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[prefix].expand(len(segments), -1, -1, -1), rows(tensor)], dim=1)

    place = torch.arange(longest, device=query.device)
    keys = torch.arange(segments[0].prefix_length + longest, device=query.device)
    allowed = keys <= segments[0].prefix_length + place[:, None]
    out = scaled_dot_product_attention(
        rows(query), after_prefix(key), after_prefix(value), attn_mask=allowed, **options
    )
    return [row[: segment.length] for row, segment in zip(out, segments, strict=True)]


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """PyTorch's attention for `[b, s, heads, dim]` tensors, key/value heads shared by groups of query heads."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        enable_gqa=query.size(2) != key.size(2),
        **options,
    )
    return out.transpose(1, 2)


class CoreAttention(MegatronModule):
    """Drop-in for megatron-core's DotProductAttention that leaves the pattern to the layout it is handed.

    A layout is any object with `attend` as in `PackedLayout`; the sampler brings one that reads a key/value cache.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedLayout,
        **unused,
    ) -> Tensor:
        """Attend: query `[T, 1, heads, dim]`, key and value `[T, 1, key_value_heads, dim]` to `[T, 1, heads*dim]`."""
        out = packed_seq_params.attend(
            self.layer_number,
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return out.reshape(out.size(0), 1, -1)
