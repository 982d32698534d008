"""Boxes: they describe what a rank has of a global tensor, whichever kind of parallelism cut it.

Tensor parallelism cuts a weight into blocks, which are boxes. The distributed optimizer cuts buffers of many weights,
laid end to end, into equal ranges; a range of an N-dimensional weight is at most 2N - 1 boxes. So boxes describe both,
and a checkpoint need not know about either.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BoxPart:
    """A box of the global tensor `key`, without its values.

    Args:
        shape: shape of the global tensor.
        offset: place of the box's first element in the global tensor.
        size: shape of the box.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        """Place behind the box's last element in the global tensor."""
        return tuple(map(sum, zip(self.offset, self.size, strict=True)))

    @property
    def nbytes(self) -> int:
        """Bytes of the box's values."""
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box of the global tensor `key`, with its values.

    Args:
        key: global name.
        shape: shape of the global tensor.
        offset: place of the box's first element in the global tensor.
        data: the box's values. Loading writes into this tensor.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.offset) == self.data.dim(), f"{self.key}: dimensions differ"

    @property
    def part(self) -> BoxPart:
        """The box without its values."""
        return BoxPart(
            key=self.key,
            dtype=self.data.dtype,
            shape=tuple(self.shape),
            offset=tuple(self.offset),
            size=tuple(self.data.shape),
        )


def range_boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that together hold the elements [start, end) of a tensor in row-major order, in that order.

    Yields:
        (offset, size) of each box.
    """
    assert 0 <= start <= end <= math.prod(shape)
    if start == end:
        return
    if len(shape) <= 1:
        yield (((start,), (end - start,)) if shape else ((), ()))
        return
    row = math.prod(shape[1:])
    first_whole, after_whole = -(-start // row), end // row
    if first_whole > after_whole:
        yield from _in_row(shape, after_whole, start, end)
        return
    if start < first_whole * row:
        yield from _in_row(shape, first_whole - 1, start, first_whole * row)
    if first_whole < after_whole:
        rest = tuple(shape[1:])
        yield (first_whole, *(0 for _ in rest)), (after_whole - first_whole, *rest)
    if after_whole * row < end:
        yield from _in_row(shape, after_whole, after_whole * row, end)


def _in_row(
    shape: Sequence[int], index: int, start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    base = index * math.prod(shape[1:])
    for offset, size in range_boxes(shape[1:], start - base, end - base):
        yield (index, *offset), (1, *size)


def tiles(shape: Sequence[int], parts: Iterable[BoxPart]) -> bool:
    """Whether the boxes `parts` cover every element of a tensor exactly once, and nothing else.

    Take a box as a function that is 1 inside and 0 outside: its differences along all dimensions are +1 or -1 at its
    corners and 0 elsewhere. The boxes add up to the whole tensor if their differences add up to those of the whole.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    whole = ((0,) * len(shape), tuple(shape))
    for weight, (start, end) in [(-1, whole), *((1, (part.offset, part.end)) for part in parts)]:
        for corner in itertools.product(*(((a, 1), (b, -1)) for a, b in zip(start, end, strict=True))):
            corners[tuple(place for place, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    return not any(corners.values())


def divide(held: Sequence[Collection[BoxPart]]) -> list[list[BoxPart]]:
    """Divide the boxes that ranks hold: one rank takes each box, and all take about equally many bytes.

    Args:
        held: the boxes of each rank.

    Returns:
        For each rank, the boxes that it takes of its own. All ranks that know `held` compute the same division.
    """
    holders: dict[BoxPart, list[int]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            holders.setdefault(part, []).append(rank)
    taken: list[list[BoxPart]] = [[] for _ in held]
    load = [0] * len(held)
    # Boxes that only one rank has come first; the other boxes then even out the load.
    for part in sorted(holders, key=lambda part: (len(holders[part]) > 1, -part.nbytes, part.key, part.offset)):
        taker = min(holders[part], key=load.__getitem__)
        load[taker] += part.nbytes
        taken[taker].append(part)
    return taken


def share_of(boxes: Iterable[Box], rank: int, size: int) -> list[Box]:
    """The boxes that replica `rank` stores, of boxes that all `size` replicas have: about equally many bytes each.

    Every replica computes the same division by itself.
    """
    by_part = {box.part: box for box in boxes}
    return [by_part[part] for part in divide([by_part] * size)[rank]]
