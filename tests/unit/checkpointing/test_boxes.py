"""Ranges of flattened tensors as boxes, and the division of boxes among replicas."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_brain.checkpointing.boxes import Box, BoxPart, divide, range_boxes, share_of, tiles


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


def part(key, *, offset=(0,), size=(1,), shape=(100,)):
    return BoxPart(key=key, dtype=torch.float32, shape=shape, offset=offset, size=size)


@given(st.lists(st.tuples(st.integers(1, 50), st.sets(st.integers(0, 3), min_size=1)), max_size=30))
def test_what_several_ranks_hold_is_taken_once_by_one_that_holds_it_whatever_the_order(parts):
    held = [[part(f"w{i}", size=(n,)) for i, (n, ranks) in enumerate(parts) if rank in ranks] for rank in range(4)]
    taken = divide(held)
    assert all(set(mine) <= set(own) for mine, own in zip(taken, held, strict=True))
    assert sorted(p.key for mine in taken for p in mine) == sorted(f"w{i}" for i in range(len(parts)))
    assert divide([list(reversed(own)) for own in held]) == taken


def test_a_rank_with_much_of_its_own_takes_little_of_what_others_have_too():
    shared = [part(f"s{i}", size=(10,)) for i in range(6)]
    for count, shares in ((12, [60, 30, 30]), (4, [30, 30, 20])):
        own = [part(f"own{i}", size=(5,)) for i in range(count)]
        taken = divide([own + shared, shared, shared])
        assert [sum(p.size[0] for p in mine) for mine in taken] == shares


@st.composite
def divisions(draw):
    """A small tensor and parts of it, often a tiling or nearly one."""
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    cuts = [sorted({0, n, *draw(st.sets(st.integers(0, n)))}) for n in shape]
    tiling = [
        part("w", shape=shape, offset=tuple(a for a, _ in ends), size=tuple(b - a for a, b in ends))
        for ends in itertools.product(*(itertools.pairwise(places) for places in cuts))
    ]
    places = st.tuples(*(st.integers(0, n) for n in shape))
    sizes = st.tuples(*(st.integers(0, 3) for _ in shape))
    added = draw(st.lists(st.builds(lambda o, n: part("w", shape=shape, offset=o, size=n), places, sizes), max_size=2))
    left_out = draw(st.integers(0, 2))
    return shape, tiling[left_out:] + added


@given(divisions())
def test_parts_tile_a_tensor_where_each_element_is_in_one_of_them(case):
    shape, parts = case
    counts = torch.zeros([n + 4 for n in shape], dtype=torch.int)
    for p in parts:
        counts[tuple(slice(o, o + n) for o, n in zip(p.offset, p.size, strict=True))] += 1
    expected = torch.zeros_like(counts)
    expected[tuple(slice(0, n) for n in shape)] = 1
    assert tiles(shape, parts) == torch.equal(counts, expected)
