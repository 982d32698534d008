"""Packed attention against a dense mask over the whole sequence."""

import itertools

import pytest
import torch
from helpers.packed import DIM, dense_attention, random_qkv, random_segments, values_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_brain.data.groups import Segment
from megatron_brain.models.attention import PackedLayout, attend_with_copies

HEADS = st.sampled_from([(4, 4), (4, 2), (3, 1), (6, 2)])
PRECISIONS = st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)])


@given(segments=random_segments(), heads=HEADS, scale=st.sampled_from([1.0, 0.25]), precision=PRECISIONS)
@settings(max_examples=100, deadline=None)
def test_values_and_gradients_are_those_of_dense_masked_attention(segments, heads, scale, precision):
    dtype, tolerance = precision
    total = sum(segment.length for segment in segments)
    inputs = [tensor.to(dtype) for tensor in random_qkv(total, *heads)]
    upstream = random_qkv(total, *heads, seed=1)[0]
    layout = PackedLayout(segments=segments)
    actual = values_and_gradients(lambda *qkv: layout.attend(1, *qkv, scale=scale), inputs, upstream)
    expected = values_and_gradients(lambda *qkv: dense_attention(segments, *qkv, scale), inputs, upstream)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert (actual[0] - expected[0]).abs().max() < 1e-6


@given(segments=random_segments(), heads=HEADS, precision=PRECISIONS)
@settings(max_examples=40, deadline=None)
def test_so_are_those_computed_with_copies_of_the_prompt(segments, heads, precision):
    dtype, tolerance = precision
    total = sum(segment.length for segment in segments)
    inputs = [tensor.to(dtype) for tensor in random_qkv(total, *heads)]
    upstream = random_qkv(total, *heads, seed=1)[0]
    actual = values_and_gradients(lambda *qkv: attend_with_copies(segments, *qkv, scale=0.5), inputs, upstream)
    expected = values_and_gradients(lambda *qkv: dense_attention(segments, *qkv, 0.5), inputs, upstream)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


LONG = (Segment(0, 300), *(Segment(300 + 150 * i, 150, 0, 300) for i in range(3)), Segment(750, 70))
"""Segments on both sides of every length at which a kernel changes: blocks of keys and queries, short ones."""


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_long_segments_too_and_in_bfloat16_as_close_as_its_rounding(heads, dtype, tolerance):
    inputs = [tensor.to(dtype) for tensor in random_qkv(820, *heads)]
    upstream = random_qkv(820, *heads, seed=1)[0].to(dtype)
    layout = PackedLayout(segments=LONG)
    actual = values_and_gradients(lambda *qkv: layout.attend(1, *qkv, scale=0.5), inputs, upstream)
    expected = values_and_gradients(lambda *qkv: dense_attention(LONG, *qkv, 0.5), inputs, upstream)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_gradient_is_the_derivative(heads):
    segments = (Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 1, 0, 3), Segment(6, 2), Segment(8, 2))
    inputs = [tensor.double().requires_grad_() for tensor in random_qkv(10, *heads)]
    layout = PackedLayout(segments=segments)
    assert torch.autograd.gradcheck(lambda *qkv: layout.attend(1, *qkv, scale=0.5), inputs)


def test_scores_of_very_different_size_merge_without_overflow():
    segments = (Segment(0, 2), Segment(2, 2, 0, 2))
    query, key, value = random_qkv(4)
    for rows in (slice(0, 2), slice(2, 4)):
        large = key.clone()
        large[rows] *= 1e4
        actual = PackedLayout(segments=segments).attend(1, query, large, value, scale=1.0)
        torch.testing.assert_close(actual, dense_attention(segments, query, large, value, 1.0).float())


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operations return and that are not views of their arguments."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        held = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in held:
                self.elements.append(tensor.numel())
        return result


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("lengths", [[6] * 64, [*range(1, 33)]], ids=["equal", "different"])
def test_no_tensor_is_larger_than_the_queries_whatever_the_number_of_responses(heads, lengths):
    ends = list(itertools.accumulate(lengths, initial=40))
    segments = (Segment(0, 40), *(Segment(end, length, 0, 40) for end, length in zip(ends, lengths)))
    query, key, value = (tensor.requires_grad_() for tensor in random_qkv(ends[-1], *heads))
    saved = []

    def save(tensor):
        saved.append(tensor.numel())
        return tensor

    with Allocations() as allocations, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        out = PackedLayout(segments=segments).attend(1, query, key, value, scale=0.5)
        out.backward(torch.ones_like(out))
    assert max(allocations.elements) == query.numel()
    assert sum(saved) == 2 * query.numel() + 2 * key.numel() + query.numel() // DIM


def test_nothing_of_a_forward_pass_without_gradients_is_kept():
    segments = (Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 4, 0, 3))
    with torch.no_grad():
        assert PackedLayout(segments=segments).attend(1, *random_qkv(9), scale=0.5).grad_fn is None


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


@pytest.mark.parametrize(
    "segments",
    [
        (Segment(0, 2), Segment(2, 1, 0, 2), Segment(3, 2), Segment(5, 1, 3, 2), Segment(6, 1, 3, 2)),
        (Segment(0, 2), Segment(2, 2), Segment(4, 1, 0, 2), Segment(5, 1, 2, 2), Segment(6, 1, 2, 2)),
    ],
    ids=["prompts before their responses", "prompts first"],
)
def test_two_groups_with_prefixes_of_equal_length_keep_to_their_own(segments):
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
