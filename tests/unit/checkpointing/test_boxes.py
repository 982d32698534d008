"""Ranges of flattened tensors as boxes, and the division of boxes among replicas."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_brain.checkpointing.boxes import Box, range_boxes, share_of


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    ends = st.integers(0, math.prod(shape))
    start, end = sorted((draw(ends), draw(ends)))
    return shape, start, end


@given(ranges())
def test_the_boxes_of_a_range_are_its_elements_in_order(case):
    shape, start, end = case
    whole = torch.arange(math.prod(shape)).view(shape)
    boxes = list(range_boxes(shape, start, end))
    elements = [
        whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].reshape(-1) for offset, size in boxes
    ]
    assert torch.equal(torch.cat([*elements, torch.empty(0, dtype=torch.long)]), torch.arange(start, end))
    assert len(boxes) <= 2 * len(shape) - 1


def test_boxes_of_a_matrix_by_hand():
    # Rows of 4: the rest of row 1, rows 2 and 3 whole, the start of row 4.
    assert list(range_boxes((6, 4), 6, 17)) == [((1, 2), (1, 2)), ((2, 0), (2, 4)), ((4, 0), (1, 1))]
    assert list(range_boxes((6, 4), 5, 7)) == [((1, 1), (1, 2))]
    assert list(range_boxes((6, 4), 8, 8)) == []


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=30), st.integers(1, 5))
def test_replicas_divide_boxes_without_gap_or_overlap_and_evenly(sizes, replicas):
    boxes = [
        Box(key=f"w{i}", shape=(n,), offset=(0,), data=torch.empty(n, dtype=torch.float32 if wide else torch.bfloat16))
        for i, (n, wide) in enumerate(sizes)
    ]
    shares = [share_of(boxes, rank, replicas) for rank in range(replicas)]
    taken = sorted(box.key for share in shares for box in share)
    assert taken == sorted(box.key for box in boxes)
    loads = [sum(box.data.nbytes for box in share) for share in shares]
    assert max(loads) - min(loads) <= max((box.data.nbytes for box in boxes), default=0)
