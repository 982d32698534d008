"""Packed attention against a dense mask over the whole sequence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.data.groups import Group, Segment, pack_groups, packed_length
from megatron_brain.models.attention import PackedLayout

DIM = 4


@st.composite
def random_segments(draw):
    """Segments of groups of every kind: lone ones, copies of a prompt, shared prefixes, padding."""
    groups, shared = [], draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        groups.append(Group(prompt=(0,) * draw(st.integers(1, 5)), responses=tuple((0,) * n for n in lengths)))
    padding = draw(st.integers(0, 3))
    return pack_groups(
        groups, shared_prefix=shared, length=packed_length(groups, shared_prefix=shared) + padding
    ).segments


def allowed_pairs(segments):
    """`[T, T]` bool: whether the row's token attends to the column's, straight from the definition."""
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


@given(
    segments=random_segments(),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    scale=st.sampled_from([1.0, 0.25]),
    precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_dense_masked_attention(segments, heads, scale, precision):
    dtype, tolerance = precision
    total = sum(segment.length for segment in segments)
    inputs = [tensor.to(dtype) for tensor in random_qkv(total, *heads)]
    upstream = random_qkv(total, *heads, seed=1)[0]

    def results(attention):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = attention(*leaves)
        (out * upstream).sum().backward()
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    layout = PackedLayout(segments=segments)
    actual = results(lambda *qkv: layout.attend(1, *qkv, scale=scale))
    expected = results(lambda *qkv: dense_attention(segments, *qkv, scale))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert (actual[0] - expected[0]).abs().max() < 1e-6


@given(segments=random_segments(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_segment_reaches_itself_and_those_it_is_the_prefix_of_and_nothing_else(segments, data):
    changed = data.draw(st.sampled_from(segments))
    query, key, value = random_qkv(sum(s.length for s in segments))
    layout = PackedLayout(segments=segments)
    before = layout.attend(1, query, key, value, scale=0.5)
    rows = slice(changed.start, changed.start + changed.length)
    for tensor in (query, key, value):
        tensor[rows] += 10.0
    after = layout.attend(1, query, key, value, scale=0.5)
    for segment in segments:
        mine = slice(segment.start, segment.start + segment.length)
        in_prefix = segment.prefix_length and segment.prefix_start == changed.start
        if segment != changed and not in_prefix:
            assert torch.equal(after[mine], before[mine])
        else:
            assert not torch.equal(after[mine], before[mine])


def test_no_gradient_flows_between_responses_of_a_group():
    segments = (Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 4, 0, 3))
    query, key, value = (tensor.requires_grad_() for tensor in random_qkv(9))
    out = PackedLayout(segments=segments).attend(1, query, key, value, scale=0.5)
    out[5:].sum().backward()
    for tensor in (key, value):
        reached = tensor.grad.abs().sum((1, 2)) > 0
        assert reached[:3].all() and not reached[3:5].any() and reached[5:].all()
    assert not query.grad[:5].any()


def test_two_groups_with_prefixes_of_equal_length_keep_to_their_own():
    segments = (Segment(0, 2), Segment(2, 1, 0, 2), Segment(3, 2), Segment(5, 1, 3, 2), Segment(6, 1, 3, 2))
    query, key, value = random_qkv(7)
    expected = dense_attention(segments, query, key, value, 0.5).float()
    torch.testing.assert_close(PackedLayout(segments=segments).attend(1, query, key, value, scale=0.5), expected)


def test_bfloat16_stays_bfloat16_and_close():
    segments = (Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 4, 0, 3))
    inputs = [tensor.bfloat16() for tensor in random_qkv(9)]
    out = PackedLayout(segments=segments).attend(1, *inputs, scale=0.5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), dense_attention(segments, *inputs, 0.5), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("segments", [(Segment(0, 4),), (Segment(0, 2), Segment(2, 1, 0, 2), Segment(3, 1, 0, 2))])
def test_dropout_of_everything_but_none_changes_the_output(segments):
    query, key, value = random_qkv(4)
    layout = PackedLayout(segments=segments)
    plain = layout.attend(1, query, key, value, scale=0.5)
    assert torch.equal(layout.attend(1, query, key, value, scale=0.5, dropout_p=0.0), plain)
    assert not torch.equal(layout.attend(1, query, key, value, scale=0.5, dropout_p=0.5), plain)
