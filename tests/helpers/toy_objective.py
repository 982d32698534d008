"""An objective of its own in one file: the log-probability of a response goes to half its reward.

    torchrun --nproc-per-node 2 tests/helpers/toy_objective.py brain --objective toy --rollout-data FILE ...

One line registers it. docs/extending.md shows this file as the recipe.
"""

import sys

import torch
from torch import Tensor

from megatron_brain.__main__ import main as run_command
from megatron_brain.objectives.objective import Numbers
from megatron_brain.stages.brain.objectives import register_objective


class Toy:
    """The mean over responses of `(log q_theta - weight)^2`."""

    needs = ("reward",)
    fixes = "weight"
    group_multiple = 1
    mean_metrics = ("mean_log_policy",)
    max_metrics = ("largest_log_policy",)
    refresh_check = None

    def fix(self, numbers: Numbers) -> Tensor:
        return numbers["reward"] / 2

    def loss(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        return ((log_policy - numbers["weight"]) ** 2).mean()

    @torch.no_grad()
    def gradient(self, log_policy: Tensor, numbers: Numbers) -> Tensor:
        return 2 * (log_policy - numbers["weight"]) / len(log_policy)

    def measure(self, log_policy: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        return {"mean_log_policy": log_policy.mean(), "largest_log_policy": log_policy.max()}


if __name__ == "__main__":
    register_objective("toy", Toy)
    sys.exit(run_command(sys.argv[1:]))
