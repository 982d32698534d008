"""How logits are cut into blocks. logprobs.py computes by these sizes, and the planner estimates by them."""

import math

PRODUCT_SIZE = 2**21
"""Entries of a low-precision matrix product that exist at one time, before they are added in float32."""


def block_shape(positions: int, ids: int, chunk_size: int) -> tuple[int, int]:
    """Positions and token ids of a block of at most `chunk_size` logits. The block is square where possible, because
    then matrix products are fastest."""
    most_positions = max(math.isqrt(chunk_size), chunk_size // max(1, ids))
    block_positions = max(1, min(positions, most_positions))
    return block_positions, max(1, min(ids, chunk_size // block_positions))


def positions_of_whole_rows(ids: int, chunk_size: int) -> int:
    """Positions of a block that holds all their token ids: at least one, whatever `chunk_size` is."""
    return max(1, chunk_size // ids)


def slices(total: int, size: int) -> list[slice]:
    """`total` places cut into runs of at most `size`."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
