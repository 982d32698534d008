"""Adds to rows of prompts how far a policy is from the posterior."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_brain.models.provider import Chunk
from megatron_brain.objectives.posterior import distances, kl_from_policy
from megatron_brain.stages.brain.rollouts import Rollout
from megatron_brain.stages.prior_samples import PriorSamples
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all


def add_distances(run: Run, samples: PriorSamples, policy: Sequence[Chunk], rows: Mapping[int, dict]) -> None:
    """Add what samples of the prior say of a policy, as `posterior/NAME` (`objectives.posterior.distances`). All ranks
    call it.

    Args:
        rows: this replica's rows by the places of their prompts. Those of prompts without samples stay as they are.

    Raises:
        AgreedError: on all ranks: numbers of a prompt give no weights.
    """
    rollouts, tau = samples.rollouts(), run.config.posterior.reward_temperature
    steps = samples.steps(rollouts)
    log_policy = {id(response): value for response, value in samples.scored(steps, policy)}

    def of_rollout(rollout: Rollout) -> dict[str, float]:
        log_q = _doubles([log_policy[id(response)] for response in rollout.responses])
        log_p, rewards = _doubles(rollout.values("log_prior")), _doubles(rollout.values("reward"))
        found = distances(log_p, rewards, log_q, reward_temperature=tau)
        return {f"posterior/{name}": value.item() for name, value in found.items()}

    measured = read_on_all(lambda: [of_rollout(rollout) for rollout in rollouts], run.parallel)
    for rollout, numbers in zip(rollouts, measured, strict=True):
        rows[rollout.index].update(numbers)


def add_kl_from_policy(run: Run, samples: PriorSamples, rows: Mapping[int, dict]) -> None:
    """Add `posterior/kl_from_policy`, which a prompt's own sample of the policy estimates.

    Args:
        rows: as `add_distances` takes them, with `kl_to_prior` and `reward/plain` of that sample.
    """
    for rollout in samples.rollouts():
        row = rows[rollout.index]
        row["posterior/kl_from_policy"] = kl_from_policy(
            _doubles([row["kl_to_prior"]]),
            _doubles([row["reward/plain"]]),
            _doubles(rollout.values("reward")),
            reward_temperature=run.config.posterior.reward_temperature,
        ).item()


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
