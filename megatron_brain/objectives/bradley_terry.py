"""The Bradley-Terry preference loss of reward models (Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_losses(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, centering_coefficient: float = 0.0
) -> Tensor:
    """Per-pair loss `-log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2`.

    Args:
        chosen: `[B]` rewards.
        rejected: `[B]` rewards.
        margin: `[B]`, how much larger the chosen reward should be (Llama 2, arXiv 2307.09288, eq. 2).
        centering_coefficient: c, which keeps rewards near zero (Eisenstein et al. 2023, arXiv 2312.09244).

    Returns:
        `[B]`, in nats.
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    if centering_coefficient:
        losses = losses + centering_coefficient * (chosen + rejected) ** 2
    return losses
