"""IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17), on sums over the tokens of a response.

TRL first divides each log-ratio by the response's number of tokens. The paper does not.
"""

from torch import Tensor

from megatron_brain.objectives.pairwise import PairwiseObjective


class IPO(PairwiseObjective):
    """`(delta - 1 / (2 strength))^2`. The strength is the paper's tau; the loss is 0 at delta = 1 / (2 strength)."""

    def pair_losses(self, delta: Tensor) -> Tensor:
        return (delta - 0.5 / self.strength) ** 2

    def pair_slopes(self, delta: Tensor) -> Tensor:
        return 2.0 * (delta - 0.5 / self.strength)
