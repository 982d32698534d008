"""How Hugging Face tensors are one of megatron-core's: which rows stand where.

Every fusion is right for weights `[out, in]` and for biases `[out]` alike. What it gives may be views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_brain.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """Hugging Face tensors, in the order of the table, to one of megatron-core's; `split` is the inverse of `join`.

    Attributes:
        stacks: the tensors, as they are, stand below each other in the one: each is a box of it.
    """

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    stacks: bool = False


def _join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Rows of each query group together: its query heads, its key head, its value head."""
    groups = model.num_query_groups
    grouped = [part.reshape(groups, part.size(0) // groups, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(fused: Tensor, model: ModelConfig) -> list[Tensor]:
    groups, head = model.num_query_groups, model.kv_channels
    query = model.num_attention_heads // groups * head
    grouped = fused.reshape(groups, query + 2 * head, *fused.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([query, head, head], dim=1)]


def _join_stacked_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    query, key = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    return _join_qkv(parts[0].split([query, key, key]), model)


def _split_stacked_qkv(fused: Tensor, model: ModelConfig) -> list[Tensor]:
    return [torch.cat(_split_qkv(fused, model))]


SAME = Fusion(join=lambda parts, model: parts[0], split=lambda whole, model: [whole], stacks=True)

TRANSPOSED = Fusion(join=lambda parts, model: parts[0].t(), split=lambda whole, model: [whole.t()])
"""A weight stored `[in, out]`, as transformers' Conv1D has it; a bias stays as it is."""

QKV = Fusion(join=_join_qkv, split=_split_qkv)
"""Three tensors: all query heads, all key heads, all value heads."""

STACKED_QKV = Fusion(join=_join_stacked_qkv, split=_split_stacked_qkv)
"""The three of `QKV` as one, below each other."""

TRANSPOSED_STACKED_QKV = Fusion(
    join=lambda parts, model: _join_stacked_qkv([parts[0].t()], model),
    split=lambda whole, model: [_split_stacked_qkv(whole, model)[0].t()],
)
"""`STACKED_QKV` stored `[in, out]`."""

GATE_UP = Fusion(
    join=lambda parts, model: torch.cat(list(parts)), split=lambda fused, model: fused.chunk(2), stacks=True
)
"""Two tensors: the gate, which goes through the activation, and what it multiplies."""
