"""What tensor-parallel ranks exchange to choose a token, each holding a part of the vocabulary."""

import torch
import torch.distributed as dist
from torch import Tensor


class VocabularyGroup:
    """The ranks that share a vocabulary: each holds equally many ids, in the order of the ranks.

    Args:
        group: their process group; None for a rank that holds the whole vocabulary.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)

    def join(self, part: Tensor) -> Tensor:
        """`[B, size * n]`: the columns `[B, n]` of all ranks, in their order."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all ranks' values, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group)
        return values
