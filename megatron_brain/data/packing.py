"""Decides which records share a packed sequence: a bin of at most `capacity` tokens. In pure Python.

Invariants of :func:`pack_by_length`, for lengths `l_0 .. l_{n-1}`:

1. every index 0 .. n-1 is in exactly one bin, and no bin is empty;
2. the lengths of a bin sum to at most `capacity`;
3. the result depends on the arguments alone (same on every rank);
4. with W windows, `ceil(sum / capacity) <= bins <= 2 * sum / capacity + W`: within a window, first fit fills all
   bins but one to more than half;
5. bins only mix records of one window of the shuffled order, so that the order of training stays random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_brain.errors import ConfigError


def pack_by_length(lengths: Sequence[int], capacity: int, *, seed: int, window: int = 1000) -> list[list[int]]:
    """Pack records into bins, first-fit-decreasing inside windows of the shuffled records.

    Args:
        lengths: tokens of each record, >= 1.
        capacity: tokens a bin can hold.
        seed: for the shuffle of the records and of each window's bins; pass another one each epoch.
        window: records packed together; larger packs tighter and takes longer (time grows with its square).

    Returns:
        bins of indices into `lengths`, in the order to train on.

    Raises:
        ConfigError: a length is below 1 or above `capacity`; names the record.
    """
    assert window >= 1, f"window={window}: must be at least 1"
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ConfigError(f"record {index} has {length} tokens; a sequence holds 1 to {capacity}")
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    bins: list[list[int]] = []
    for start in range(0, len(order), window):
        packed = _first_fit_decreasing(order[start : start + window], lengths, capacity)
        rng.shuffle(packed)
        bins += packed
    return bins


def _first_fit_decreasing(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each record, longest first, into the first bin with room. Ties keep the order of `indices`."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
        need = lengths[index]
        place = next((b for b, free in enumerate(room) if free >= need), None)
        if place is None:
            bins.append([index])
            room.append(capacity - need)
        else:
            bins[place].append(index)
            room[place] -= need
    return bins
