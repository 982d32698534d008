"""Core attention over packed sequences with shared prefixes, on PyTorch's own kernels."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_brain.data.groups import Segment
from megatron_brain.models.rotary import Rotated

SegmentAttention = Callable[[tuple[Segment, ...], Tensor, Tensor, Tensor], Tensor]
"""Attention `[T, heads, dim]` of segments, from query `[T, heads, dim]`, key and value `[T, key_value_heads, dim]`."""


@dataclass
class PackedLayout(PackedSeqParams):
    """Says which tokens of a packed sequence attend to which. megatron-core passes it on as its packed_seq_params.

    `qkv_format` stays unset, so that megatron-core keeps `[T, 1, heads, dim]` and rotates by the table it is given.
    """

    segments: tuple[Segment, ...] = ()

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        dropout_p: float = 0.0,
        attention: SegmentAttention | None = None,
    ) -> Tensor:
        """Attention of every segment to itself, causally, and to its prefix.

        Args:
            layer_number: global number of the layer, from 1.
            query: `[T, heads, dim]`. key, value: `[T, key_value_heads, dim]`.
            scale: multiplies the scores. dropout_p: probability with which a weight of the softmax is dropped.
            attention: computes the result in place of PyTorch, with a scale and a dropout of its own.

        Returns:
            `[T, heads, dim]`.
        """
        if attention is not None:
            return attention(self.segments, query, key, value)
        if query.device.type == "cpu" and not dropout_p:
            return _TwoPartAttention.apply(query, key, value, self.segments, scale)
        return attend_with_copies(self.segments, query, key, value, scale=scale, dropout_p=dropout_p)


def by_prefix(segments: tuple[Segment, ...]) -> Iterator[list[Segment]]:
    """Runs of neighbouring segments that have the same prefix, or no prefix."""
    for _, run in itertools.groupby(segments, key=lambda segment: (segment.prefix_start, segment.prefix_length)):
        yield list(run)


def by_length(segments: tuple[Segment, ...]) -> Iterator[list[Segment]]:
    """Runs of neighbouring segments that have the same length."""
    for _, run in itertools.groupby(segments, key=lambda segment: segment.length):
        yield list(run)


class _TwoPartAttention(torch.autograd.Function):
    """Merges the attention of segments to themselves with the attention of responses to their prompt.

    Softmax over two sets of keys is the average of the softmaxes over each, weighted by their shares of the sum of
    exponentials. So all responses of a prompt attend to it in one unmasked call. This call reads the prompt's keys and
    values in place and once, whatever the number and lengths of the responses. The gradient splits alike: the backward
    kernels compute the weights again from the scores and their log-sum-exp. With the log-sum-exp over both sets these
    are the weights of the whole softmax (FlashAttention, https://arxiv.org/abs/2205.14135; over devices, Ring
    Attention, https://arxiv.org/abs/2310.01889). So besides its arguments, it keeps the output and one number per row
    and head.

    `F.scaled_dot_product_attention` returns no log-sum-exp, so this calls the kernels that it calls on a CPU.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float) -> Tensor:
        """Compute what `PackedLayout.attend` describes."""
        per_key = query.size(1) // key.size(1)
        out = torch.empty(query.shape, dtype=query.dtype)
        lse = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        queries, outs, lses = (_by_head(tensor, per_key) for tensor in (query, out, lse))
        keys, values = (_by_head(tensor, 1).expand(per_key, -1, -1, -1) for tensor in (key, value))
        for call in _kernel_calls(segments):
            call_out, call_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                call.queries(queries), call.keys(keys), call.keys(values), is_causal=call.is_causal, scale=scale
            )
            out_here, lse_here = call.query_rows(outs), call.query_rows(lses)
            call_out, call_lse = call_out.view_as(out_here), call_lse.view_as(lse_here)
            if call.is_causal:
                out_here.copy_(call_out)
                lse_here.copy_(call_lse)
            else:
                share = torch.sigmoid(call_lse - lse_here)[..., None]
                out_here.copy_(torch.lerp(out_here.to(lse.dtype), call_out.to(lse.dtype), share))
                lse_here.copy_(torch.logaddexp(lse_here, call_lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        per_key = query.size(1) // key.size(1)
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
        queries, outs, lses, grad_outs = (_by_head(tensor, per_key) for tensor in (query, out, lse, grad_out))
        keys, values = (_by_head(tensor, 1).expand(per_key, -1, -1, -1) for tensor in (key, value))
        grad_queries, grad_keys, grad_values = map(_by_head, grads, (per_key, 1, 1))
        for call in _kernel_calls(ctx.segments):
            # In bfloat16 the kernel has a cost per sequence and head: float32 is 5 times faster at 48 tokens, and no
            # faster at 200.
            dtype = lse.dtype if call.length <= 128 else query.dtype
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                call.queries(grad_outs).to(dtype),
                call.queries(queries).to(dtype),
                call.keys(keys).to(dtype),
                call.keys(values).to(dtype),
                call.queries(outs).to(dtype),
                call.queries(lses),
                dropout_p=0.0,
                is_causal=call.is_causal,
                scale=ctx.scale,
            )
            call.add(call.query_rows(grad_queries), of_query)
            call.add(call.key_rows(grad_keys), of_key)
            call.add(call.key_rows(grad_values), of_value)
        return *grads, None, None


def _by_head(tensor: Tensor, per_key: int) -> Tensor:
    """View `[per_key, key_heads, T, ...]` of a tensor `[T, key_heads * per_key, ...]`.

    The kernels know no grouped-query attention. So the query heads of a key go to the dimension that the kernels take
    for the batch: keys can be expanded along it without a copy.
    """
    return tensor.view(tensor.size(0), -1, per_key, *tensor.shape[2:]).movedim((2, 1), (0, 1))


@dataclass(frozen=True)
class _KernelCall:
    """One call of the kernels. Either `batch` neighbouring segments of `length` rows attend causally, each to itself;
    or all responses of a prompt, as one segment (`batch` 1), attend to the prompt. Methods take views by `_by_head`."""

    start: int
    length: int
    batch: int
    key_start: int
    key_length: int
    is_causal: bool

    def query_rows(self, tensor: Tensor) -> Tensor:
        """View `[batch, per_key, key_heads, length, ...]`."""
        return self._split(tensor, self.start, self.length)

    def key_rows(self, tensor: Tensor) -> Tensor:
        """View `[batch, per_key or 1, key_heads, key_length, dim]`."""
        return self._split(tensor, self.key_start, self.key_length)

    def queries(self, tensor: Tensor) -> Tensor:
        """`query_rows` in the shape that the kernels take, `[batch * per_key, key_heads, length, ...]`."""
        return self.query_rows(tensor).flatten(0, 1)

    def keys(self, tensor: Tensor) -> Tensor:
        """`key_rows` in the shape that the kernels take, `[batch * per_key, key_heads, key_length, dim]`."""
        return self.key_rows(tensor).flatten(0, 1)

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add the kernels' gradient to its rows of `total`. Causal calls cover every row and come first: they write."""
        grad = grad.view(self.batch, -1, *grad.shape[1:])
        if grad.size(1) != total.size(1):
            grad = grad.sum(1, keepdim=True)
        if self.is_causal:
            total.copy_(grad)
        else:
            total.add_(grad)

    def _split(self, tensor: Tensor, start: int, length: int) -> Tensor:
        rows = tensor.narrow(2, start, self.batch * length)
        if self.batch == 1:
            return rows[None]
        return rows.view(*rows.shape[:2], self.batch, length, *rows.shape[3:]).movedim(2, 0)


def _kernel_calls(segments: tuple[Segment, ...]) -> Iterator[_KernelCall]:
    """The calls that make up the attention of all segments: first of segments to themselves, then to prefixes."""
    for run in by_length(segments):
        start, length = run[0].start, run[0].length
        yield _KernelCall(start, length, len(run), key_start=start, key_length=length, is_causal=True)
    for run in by_prefix(segments):
        if run[0].prefix_length:
            length = sum(segment.length for segment in run)
            yield _KernelCall(run[0].start, length, 1, run[0].prefix_start, run[0].prefix_length, is_causal=False)


def attend_with_copies(segments: tuple[Segment, ...], query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """`PackedLayout.attend` for other devices and for dropout, with public calls only. It copies the prompt's keys and
    values for every response, pads the prompt's responses to the longest, and uses an explicit causal mask."""
    outs: list[Tensor] = []
    for run in by_prefix(segments):
        if run[0].prefix_length:
            outs += _attend_after_prefix(run, query, key, value, **options)
        else:
            outs += [_attend_to_self(segment, query, key, value, **options) for segment in run]
    return torch.cat(outs)


def _attend_to_self(segment: Segment, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    rows = slice(segment.start, segment.start + segment.length)
    out = scaled_dot_product_attention(query[None, rows], key[None, rows], value[None, rows], is_causal=True, **options)
    return out[0]


def _attend_after_prefix(segments: list[Segment], query: Tensor, key: Tensor, value: Tensor, **options) -> list[Tensor]:
    """Attention of one prompt's responses in one call: each row of the batch is a response, padded at its end."""
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
    """PyTorch's attention for `[b, s, heads, dim]` tensors. Several query heads may share a key/value head."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        enable_gqa=query.size(2) != key.size(2),
        **options,
    )
    return out.transpose(1, 2)


class CoreAttention(MegatronModule):
    """Replaces megatron-core's DotProductAttention. The layout that it is given decides who attends to whom.

    A layout is any object with an `attend` like that of `PackedLayout`; the sampler's layout reads a key/value cache.
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
        layout = packed_seq_params
        query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        if isinstance(layout, Rotated):
            query, key = layout.rotate(query), layout.rotate(key)
            layout = layout.layout
        dropout_p = self.dropout if self.training else 0.0
        out = layout.attend(
            self.layer_number, query, key, value, scale=self.scale, dropout_p=dropout_p, **self.options(layout)
        )
        return out.reshape(out.size(0), 1, -1)

    def options(self, layout: PackedLayout) -> dict:
        """Further keyword arguments for the layout's `attend`."""
        return {}
