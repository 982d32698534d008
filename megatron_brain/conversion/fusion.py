"""How one tensor of megatron-core is made of Hugging Face tensors: the order of the rows.

Every fusion works on weights `[out, in]` and on biases `[out]`. The tensors that it returns may be views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_brain.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A way to make one tensor of megatron-core of Hugging Face tensors.

    Attributes:
        join: makes the tensor of the Hugging Face tensors, which are in the order of the table.
        split: the inverse of `join`.
        stacks: whether the Hugging Face tensors stand unchanged below each other, so that each is a box of the tensor.
    """

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    stacks: bool = False


def _join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """The rows of each query group stand together: its query heads, its key head, its value head."""
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
"""One tensor, unchanged."""

TRANSPOSED = Fusion(join=lambda parts, model: parts[0].t(), split=lambda whole, model: [whole.t()])
"""One weight that is stored `[in, out]`, as transformers' Conv1D stores it. A bias stays unchanged."""

QKV = Fusion(join=_join_qkv, split=_split_qkv)
"""Three tensors: all query heads, all key heads, all value heads."""

STACKED_QKV = Fusion(join=_join_stacked_qkv, split=_split_stacked_qkv)
"""One tensor: the three of `QKV` below each other."""

TRANSPOSED_STACKED_QKV = Fusion(
    join=lambda parts, model: _join_stacked_qkv([parts[0].t()], model),
    split=lambda whole, model: [_split_stacked_qkv(whole, model)[0].t()],
)
"""The tensor of `STACKED_QKV`, stored `[in, out]`."""

GATE_UP = Fusion(
    join=lambda parts, model: torch.cat(list(parts)), split=lambda fused, model: fused.chunk(2), stacks=True
)
"""Two tensors: the gate, which goes through the activation, and the projection that it multiplies."""
