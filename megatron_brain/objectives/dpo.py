"""DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), which is RSO's sigmoid-norm too (Liu et al. 2023, 2309.06657).

DPO calls the strength beta, RSO gamma. (TRL's `sigmoid` is this loss; its `sigmoid_norm` is another one.)
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
