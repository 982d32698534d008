"""Gathers the weights of a model from all ranks, by their global names."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Every whole weight on rank 0, by global name and layer, without vocabulary padding. Other ranks get nothing.

    Raises:
        AssertionError: ranks that hold the same part of a weight do not agree bit for bit, or a part is missing.
    """
    from megatron_brain.checkpointing.state import model_boxes

    parts = [(box.key, box.shape, box.offset, box.data.float().numpy()) for box in model_boxes(chunks)]
    world: list = [None] * dist.get_world_size()
    dist.gather_object(parts, world if dist.get_rank() == 0 else None)
    whole: dict[str, Tensor] = {}
    for rank, theirs in enumerate(world if dist.get_rank() == 0 else []):
        for name, shape, offset, data in theirs:
            weight = whole.setdefault(name, torch.full(shape, torch.nan))
            place = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
            part = torch.from_numpy(data)
            known = ~weight[place].isnan()
            assert torch.equal(weight[place][known], part[known]), f"{name}: rank {rank} has other values"
            weight[place] = part
    for name, weight in whole.items():
        assert weight.isfinite().all(), f"{name}: no rank holds a part of it, or it is not finite"
    return whole


def relative_differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """For each weight, the norm of the difference over the norm of the expected weight."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    return {
        name: float((actual[name].double() - weight.double()).norm() / weight.double().norm())
        for name, weight in expected.items()
    }
