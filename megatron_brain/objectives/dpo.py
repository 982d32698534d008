"""DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). RSO's sigmoid-norm (Liu et al. 2023, 2309.06657) is the same.

DPO calls the strength beta, RSO calls it gamma. TRL's `sigmoid` is this loss; its `sigmoid_norm` is another loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_brain.objectives.pairwise import PairwiseObjective


class DPO(PairwiseObjective):
    """`-log sigmoid(strength delta)`: the pair's negative log-likelihood under Bradley-Terry."""

    def pair_losses(self, delta: Tensor) -> Tensor:
        return -F.logsigmoid(self.strength * delta)

    def pair_slopes(self, delta: Tensor) -> Tensor:
        return -self.strength * torch.sigmoid(-self.strength * delta)
