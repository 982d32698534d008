"""Packed sequences to test attention on, and their attention by its definition."""

import math

import torch
from hypothesis import strategies as st

from megatron_brain.data.groups import Group, pack_groups, packed_length

DIM = 4


@st.composite
def random_segments(draw):
    """Segments of groups of every kind: single segments, copies of a prompt, shared prefixes, padding."""
    groups, shared = [], draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        groups.append(Group(prompt=(0,) * draw(st.integers(1, 5)), responses=tuple((0,) * n for n in lengths)))
    padding = draw(st.integers(0, 3))
    return pack_groups(
        groups, shared_prefix=shared, length=packed_length(groups, shared_prefix=shared) + padding
    ).segments


def allowed_pairs(segments):
    """`[T, T]` bool: whether the row's token attends to the column's token, by the definition."""
    total = sum(segment.length for segment in segments)
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for segment in segments:
        for row in range(segment.start, segment.start + segment.length):
            allowed[row, segment.prefix_start : segment.prefix_start + segment.prefix_length] = True
            allowed[row, segment.start : row + 1] = True
    return allowed


def random_qkv(total, heads=4, key_value_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, n, DIM, generator=generator) for n in (heads, key_value_heads, key_value_heads)]


def dense_attention(segments, query, key, value, scale):
    """Softmax attention in float64 under the dense mask."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    repeats = query.size(1) // key.size(1)
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~allowed_pairs(segments), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def values_and_gradients(attention, inputs, upstream):
    """The output and the gradients of the inputs, in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = attention(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]
