"""Core attention over packed sequences on Transformer Engine. It has not been run on a GPU.

It relies on what `transformer_engine.pytorch.DotProductAttention` documents: sequences of different lengths laid end to
end (`qkv_format="thd"`), their bounds as cumulative lengths, and the masks `padding_causal` (a sequence attends to
itself) and `padding_causal_bottom_right` (the last query sees the last key: the queries are the last rows of their
keys). Its fused kernels take float16 and bfloat16 only; float32 gets its unfused kernels, which hold all scores.
"""

import functools
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_brain.data.groups import Segment
from megatron_brain.models.attention import CoreAttention, PackedLayout


class TransformerEngineAttention(CoreAttention):
    """Attention of packed sequences in two calls, whatever the number of groups: in one, segments without a prefix
    attend to themselves; in the other, responses attend to their prompt and themselves. The sampler's decoding steps
    do not use Transformer Engine.

    Raises:
        ImportError: Transformer Engine is not installed.
    """

    def __init__(self, config: TransformerConfig, *arguments, pg_collection: ProcessGroupCollection, **options) -> None:
        super().__init__(config, *arguments, **options)
        from transformer_engine.pytorch import DotProductAttention

        tracker = get_cuda_rng_tracker()
        settings = {
            "num_attention_heads": config.num_attention_heads,
            "kv_channels": config.kv_channels,
            "num_gqa_groups": config.num_query_groups,
            "attention_dropout": self.dropout,
            "qkv_format": "thd",
            "sequence_parallel": config.sequence_parallel,
            "tp_size": config.tensor_model_parallel_size,
            "tp_group": pg_collection.tp,
            "get_rng_state_tracker": get_cuda_rng_tracker if tracker.is_initialized() else None,
            "layer_number": self.layer_number,
            "softmax_scale": self.scale,
        }
        self.to_self = DotProductAttention(attn_mask_type="padding_causal", attention_type="self", **settings)
        # It must be "cross": with "self" the unfused kernels take the queries' lengths for the keys' lengths.
        self.after_prefix = DotProductAttention(
            attn_mask_type="padding_causal_bottom_right", attention_type="cross", **settings
        )

    def options(self, layout: PackedLayout) -> dict:
        """Keyword arguments for the layout's `attend`, see `CoreAttention.options`."""
        return {"attention": self.attend} if isinstance(layout, PackedLayout) else {}

    def attend(self, segments: tuple[Segment, ...], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of `segments`, as `PackedLayout.attend` describes it."""
        plan = _plan(segments, query.device)
        if plan.after_prefix is None:
            return self.to_self(query, key, value, **plan.to_self.arguments).view_as(query)
        out = [
            attention(
                query.index_select(0, call.queries),
                _Gather.apply(key, call.keys),
                _Gather.apply(value, call.keys),
                **call.arguments,
            )
            for attention, call in ((self.to_self, plan.to_self), (self.after_prefix, plan.after_prefix))
        ]
        return torch.cat(out).index_select(0, plan.in_order).view_as(query)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing, so that checkpoints are the same whichever attention wrote them."""
        return {}


@dataclass(frozen=True)
class _Call:
    """One call of DotProductAttention. queries, keys: their rows in the packed sequence, int64; a prompt's keys come
    once for each of its responses. arguments: the call's keyword arguments."""

    queries: Tensor
    keys: Tensor
    arguments: dict


@dataclass(frozen=True)
class _Plan:
    """The calls for a sequence. in_order: for each row of the sequence, its place in the calls' output; `[T]` int64."""

    to_self: _Call
    after_prefix: _Call | None
    in_order: Tensor


@functools.lru_cache(maxsize=8)
def _plan(segments: tuple[Segment, ...], device: torch.device) -> _Plan:
    """The plan for a sequence. The cache lets all layers share it."""
    responses = [segment for segment in segments if segment.prefix_length]
    to_self = _call([segment for segment in segments if not segment.prefix_length], device)
    after_prefix = _call(responses, device) if responses else None
    queries = torch.cat([call.queries for call in (to_self, after_prefix) if call is not None])
    return _Plan(to_self, after_prefix, in_order=queries.argsort())


def _call(segments: list[Segment], device: torch.device) -> _Call:
    own = [torch.arange(s.start, s.start + s.length) for s in segments]
    prefixes = [torch.arange(s.prefix_start, s.prefix_start + s.prefix_length) for s in segments]
    keys = [torch.cat(rows) for rows in zip(prefixes, own, strict=True)]
    arguments = {
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal_bottom_right" if segments[0].prefix_length else "padding_causal",
        "cu_seqlens_q": _cumulative_lengths(own).to(device),
        "cu_seqlens_kv": _cumulative_lengths(keys).to(device),
        # Without these two, Transformer Engine would read the lengths back from the device.
        "max_seqlen_q": max(map(len, own)),
        "max_seqlen_kv": max(map(len, keys)),
    }
    return _Call(torch.cat(own).to(device), torch.cat(keys).to(device), arguments)


def _cumulative_lengths(sequences: list[Tensor]) -> Tensor:
    """Cumulative lengths `[sequences + 1]` int32, from 0."""
    return torch.tensor([0, *map(len, sequences)]).cumsum(0).to(torch.int32)


class _Gather(torch.autograd.Function):
    """Rows of a tensor. Their gradients are summed in float32: a prompt's key gets one from each response."""

    @staticmethod
    def forward(ctx, tensor: Tensor, rows: Tensor) -> Tensor:
        """`tensor[rows]`."""
        ctx.save_for_backward(rows)
        ctx.shape = tensor.shape
        return tensor.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of the tensor."""
        [rows] = ctx.saved_tensors
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=dtype, device=grad.device)
        return total.index_add_(0, rows, grad.to(dtype)).to(grad.dtype), None
