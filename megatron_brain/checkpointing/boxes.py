"""Parts of a global tensor as boxes: what a rank has of it, whatever cut it.

Tensor parallelism cuts a weight into blocks, which are boxes. The distributed optimizer cuts buffers of many weights,
laid end to end, into equal ranges; a range of an N-dimensional weight is at most 2N - 1 boxes. So one kind of piece
describes both, and a checkpoint knows neither.
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
    """A box of the global tensor `key` without its values.

    Args:
        shape: of the global tensor.
        offset: of the box's first element in the global tensor.
        size: of the box.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        """Where the box ends in the global tensor."""
        return tuple(map(sum, zip(self.offset, self.size, strict=True)))

    @property
    def nbytes(self) -> int:
        """Bytes of the box's values."""
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box of the global tensor `key`.

    Args:
        key: global name.
        shape: of the global tensor.
        offset: of the box's first element in the global tensor.
        data: the box's values; where it is loaded into, they are written through.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.offset) == self.data.dim(), f"{self.key}: dimensions differ"

    @property
    def part(self) -> BoxPart:
        """Which part of the global tensor it is."""
        return BoxPart(
            key=self.key,
            dtype=self.data.dtype,
            shape=tuple(self.shape),
            offset=tuple(self.offset),
            size=tuple(self.data.shape),
        )


def range_boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that together are the elements [start, end) of a tensor in row-major order, in that order.

    Yields:
        (offset, size) of each.
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
    """Whether parts have every element of a tensor once and nothing else.

    A box is 1 inside and 0 outside; its differences along all dimensions are +1 or -1 at its corners and 0 elsewhere.
    The parts' sum is the whole tensor where their differences are those of the whole.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    whole = ((0,) * len(shape), tuple(shape))
    for weight, (start, end) in [(-1, whole), *((1, (part.offset, part.end)) for part in parts)]:
        for corner in itertools.product(*(((a, 1), (b, -1)) for a, b in zip(start, end, strict=True))):
            corners[tuple(place for place, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    return not any(corners.values())


def divide(held: Sequence[Collection[BoxPart]]) -> list[list[BoxPart]]:
    """Who takes which of the parts that ranks hold: each part once, about equally many bytes a rank.

    Args:
        held: the parts of each rank.

    Returns:
        What each rank takes of its own. All ranks that know `held` come to the same division.
    """
    holders: dict[BoxPart, list[int]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            holders.setdefault(part, []).append(rank)
    taken: list[list[BoxPart]] = [[] for _ in held]
    load = [0] * len(held)
    # What one rank alone has first: the rest evens it out.
    for part in sorted(holders, key=lambda part: (len(holders[part]) > 1, -part.nbytes, part.key, part.offset)):
        taker = min(holders[part], key=load.__getitem__)
        load[taker] += part.nbytes
        taken[taker].append(part)
    return taken


def share_of(boxes: Iterable[Box], rank: int, size: int) -> list[Box]:
    """Of boxes that `size` replicas all have, those that replica `rank` stores: about equally many bytes each.

    Every replica comes to the same division by itself.
    """
    by_part = {box.part: box for box in boxes}
    return [by_part[part] for part in divide([by_part] * size)[rank]]
