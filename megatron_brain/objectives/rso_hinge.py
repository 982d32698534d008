"""RSO's hinge-norm (Liu et al. 2023, arXiv 2309.06657): SLiC's hinge on log-ratios. TRL's `hinge` is this loss.

RSO's other loss, sigmoid-norm, is DPO's loss.
"""

import torch
from torch import Tensor

from megatron_brain.objectives.pairwise import PairwiseObjective


class RSOHinge(PairwiseObjective):
    """`max(0, 1 - strength delta)`. RSO calls the strength gamma. The slope at the corner is 0."""

    def pair_losses(self, delta: Tensor) -> Tensor:
        return torch.relu(1.0 - self.strength * delta)

    def pair_slopes(self, delta: Tensor) -> Tensor:
        return -self.strength * (self.strength * delta < 1.0).to(delta.dtype)
