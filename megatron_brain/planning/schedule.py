"""The order in which a pipeline stage runs its micro-batches, as megatron-core's schedules do."""

from collections.abc import Iterator
from typing import Literal

Direction = Literal["forward", "backward"]


def pipeline_steps(stage: int, stages: int, chunks: int, micro_batches: int) -> Iterator[tuple[Direction, int]]:
    """Passes of one stage in a training step, as (direction, model chunk): warm-up, one forward one backward, the rest.

    Args:
        stages: pipeline stages. chunks: of each stage; with more than one the schedule is the interleaved one, which
            takes `stages` micro-batches through a chunk before it goes to the next.
    """
    order = _chunk_order(stages, chunks, micro_batches)
    total = len(order)
    warm_up = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    warm_up = min(warm_up, total) if stages > 1 else 0
    for chunk in order[:warm_up]:
        yield "forward", chunk
    for place in range(total):
        if warm_up + place < total:
            yield "forward", order[warm_up + place]
        yield "backward", chunks - 1 - order[place]


def _chunk_order(stages: int, chunks: int, micro_batches: int) -> list[int]:
    """The chunk of every forward pass."""
    groups = [min(stages, micro_batches - first) for first in range(0, micro_batches, stages)]
    return [chunk for group in groups for chunk in range(chunks) for _ in range(group)]
