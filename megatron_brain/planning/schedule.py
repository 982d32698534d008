"""The order in which a pipeline stage runs its micro-batches, as megatron-core's schedules do."""

from collections.abc import Iterator
from typing import Literal

Direction = Literal["forward", "backward"]


def pipeline_steps(
    pipeline_stage: int, pipeline: int, chunks: int, micro_batches: int
) -> Iterator[tuple[Direction, int]]:
    """Passes of one pipeline stage in a training step, as (direction, model chunk).

    Args:
        pipeline: number of pipeline stages.
        chunks: model chunks of each; with more than one the schedule is the interleaved one, which takes `pipeline`
            micro-batches through a chunk before it goes to the next.
    """
    order = _chunk_order(pipeline, chunks, micro_batches)
    total, behind = len(order), pipeline - pipeline_stage - 1
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * pipeline
    warm_up = min(warm_up, total) if pipeline > 1 else 0
    for chunk in order[:warm_up]:
        yield "forward", chunk
    for place in range(total):
        if warm_up + place < total:
            yield "forward", order[warm_up + place]
        yield "backward", chunks - 1 - order[place]


def _chunk_order(pipeline: int, chunks: int, micro_batches: int) -> list[int]:
    """The chunk of every forward pass."""
    groups = [min(pipeline, micro_batches - first) for first in range(0, micro_batches, pipeline)]
    return [chunk for group in groups for chunk in range(chunks) for _ in range(group)]
