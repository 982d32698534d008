"""What the brain stage trains on: the protocol of an objective.

An objective sees one group at a time: one prompt with its n responses. Its tensors are `[n]`, one entry per response,
float32 or better. Log-probabilities are sums over a response's tokens, EOS included, in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Numbers = Mapping[str, Tensor]
"""What is known of a group's responses besides log q_theta, each `[n]`: the numbers that an objective needs, and the
one that it fixes."""


@dataclass(frozen=True)
class RefreshCheck:
    """What holds as long as the policy still is the proposal: a metric of `max_metrics` that is 0, and the claim in
    words."""

    metric: str
    claim: str


class Objective(Protocol):
    """Loss of one group. The loss of a step is the mean over groups.

    What is declared here as an attribute is known without a group, and so are the names of the metrics: all ranks know
    them, those without groups too.
    """

    needs: tuple[str, ...]
    """The numbers that have to be known of each response: "reward", which the stage reports too, and those of
    "log_prior" (log p, of the fixed SFT model) and "log_proposal" (log q', of what the responses were drawn from) that
    are used."""
    fixes: str
    """Name of the number per response that follows from these and stays for the whole round, such as "advantage"."""
    group_multiple: int
    """The responses of a group are a multiple of this many."""
    mean_metrics: tuple[str, ...]
    """Metrics that are averaged over groups."""
    max_metrics: tuple[str, ...]
    """Metrics of which the largest counts."""
    refresh_check: RefreshCheck | None

    def fix(self, numbers: Numbers) -> Tensor:
        """The number `[n]` that stays for the round, from those it `needs`.

        Raises:
            UserError: nothing follows from its numbers.
        """

    def loss(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """A scalar, differentiable in log q_theta(y_i) `[n]` alone."""

    def gradient(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        """d loss / d log q_theta(y_i) `[n]`, in closed form and without a graph.

        As constants they weight the log-probabilities: `sum_i gradient_i log q_theta(y_i)` has the loss's gradient in
        the parameters. So a first pass without gradients gives them for a whole group, and a second pass may take its
        responses one by one.
        """

    def measure(self, log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        """A scalar for each of `mean_metrics` and `max_metrics`; `log_policy` has no graph."""
