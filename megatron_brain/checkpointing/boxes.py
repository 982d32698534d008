"""Parts of a global tensor as boxes: what a rank has of it, whatever cut it.

Tensor parallelism cuts a weight into blocks, which are boxes. The distributed optimizer cuts buffers of many weights,
laid end to end, into equal ranges; a range of an N-dimensional weight is at most 2N - 1 boxes. So one kind of piece
describes both, and a checkpoint knows neither.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


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


def _in_row(shape: Sequence[int], index: int, start: int, end: int) -> Iterator:
    base = index * math.prod(shape[1:])
    for offset, size in range_boxes(shape[1:], start - base, end - base):
        yield (index, *offset), (1, *size)


def share_of(boxes: Iterable[Box], rank: int, size: int) -> list[Box]:
    """Of boxes that `size` replicas all have, those that replica `rank` stores: about equally many bytes each.

    Every replica comes to the same division by itself.
    """
    load = [0] * size
    mine = []
    for box in sorted(boxes, key=lambda box: (-box.data.nbytes, box.key, box.offset)):
        taker = load.index(min(load))
        load[taker] += box.data.nbytes
        if taker == rank:
            mine.append(box)
    return mine
