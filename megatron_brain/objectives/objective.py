"""The protocol of an objective, which is what the brain stage trains on.

An objective sees one group at a time: one prompt with its n responses. Its tensors are `[n]`, one entry per response,
float32 or better. Log-probabilities are sums over a response's tokens, EOS included, in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Numbers = Mapping[str, Tensor]
"""The numbers of a group's responses besides log q_theta, each `[n]`: those that an objective needs, and
the one that it fixes."""


@dataclass(frozen=True)
class RefreshCheck:
    """A claim that holds as long as the policy is still the proposal: a metric of `max_metrics` is 0. `claim` says what
    that means, in words."""

    metric: str
    claim: str


class Objective(Protocol):
    """Loss of one group. The loss of a step is the mean over groups.

    The attributes are known without a group. So all ranks know them and the names of the metrics, even ranks that have
    no groups.
    """

    needs: tuple[str, ...]
    """The numbers of each response that the objective needs: always "reward", which the stage also reports; "log_prior"
    (log p of the fixed SFT model) and "log_proposal" (log q' of the distribution that the responses were drawn from) if
    it uses them."""
    fixes: str
    """Name of the number per response that follows from these and is fixed for the round, such as "advantage"."""
    group_multiple: int
    """The number of responses in a group is a multiple of this."""
    mean_metrics: tuple[str, ...]
    """Metrics that are averaged over groups."""
    max_metrics: tuple[str, ...]
    """Metrics of which the maximum over groups is taken."""
    refresh_check: RefreshCheck | None

    def fix(self, numbers: Numbers) -> Tensor:
        """The number `[n]` that is fixed for the round, from the numbers that it `needs`.

        Raises:
            UserError: the numbers do not determine it, for example because one is NaN.
        """

    def loss(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """A scalar, differentiable in log q_theta(y_i) `[n]` alone."""

    def gradient(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """d loss / d log q_theta(y_i) `[n]`, in closed form and without a graph.

        With these numbers as constants, `sum_i gradient_i log q_theta(y_i)` has the gradient of the loss in the
        parameters. So a first pass without gradients computes them for a whole group, and a second pass may take the
        responses one by one.
        """

    def measure(self, log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        """A scalar for each of `mean_metrics` and `max_metrics`; `log_policy` has no graph."""
