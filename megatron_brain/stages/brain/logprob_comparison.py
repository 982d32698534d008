"""Compares log q' of the trainer with that of the engine that drew, and the weights that follow from each."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_brain.objectives.importance import effective_sample_size, policy_log_weights
from megatron_brain.objectives.objective import Objective
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.stages.brain.rollouts import Rollout

DIFFERENCES = ("sampler_logprob_difference", "sampler_logprob_largest_difference")
"""Metrics of every objective whose log q' the trainer computes."""
WEIGHTS = ("ess_alpha_trainer", "ess_alpha_engine", "ess_beta_engine", "largest_weight_change")
"""Further metrics of an objective with weights alpha."""

_SIDES = {"trainer": "trainer_logprob", "engine": "sampler_logprob"}


def compare_logprobs(
    rollouts: Sequence[Rollout], objective: Objective, parallel: Parallel, *, strength: float, limit: float
) -> dict[str, float]:
    """Metrics over the responses of all replicas, the same on all ranks. All ranks call it together.

    Args:
        rollouts: this replica's, with both log-probabilities and the other numbers that the objective needs. If some
            response of any replica has no `largest_token_difference`, as in files of other engines, that metric is left
            out.
        strength: b of beta.
        limit: of the mean difference, in nats per token.

    Raises:
        RuntimeError: the mean difference exceeds the limit.
    """
    found = _differences(rollouts)
    has_weights = objective.fixes == "alpha"
    if has_weights:
        found |= _weights(rollouts, objective, strength)
    largest = {name: value for name, value in found.items() if "largest" in name}
    sums = {name: value for name, value in found.items() if name not in largest}
    everyone = parallel.gather_over_data_parallel((sums, largest))
    total = {name: sum(replica[name] for replica, _ in everyone) for name in sums}
    known = [name for name in largest if all(name in replica for _, replica in everyone)]
    metrics = {name: max(replica[name] for _, replica in everyone) for name in known}
    metrics["sampler_logprob_difference"] = total["difference"] / total["tokens"]
    if has_weights:
        metrics |= {name: total[name] / total["groups"] for name in WEIGHTS if name in total}
    _require_close(metrics["sampler_logprob_difference"], limit)
    return metrics


def _differences(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mean is of the sums over responses, which make the weights; the largest is of single tokens."""
    responses = [response for rollout in rollouts for response in rollout.responses]
    found: dict[str, float] = {
        "difference": sum(abs(response.trainer_logprob - response.sampler_logprob) for response in responses),
        "tokens": sum(len(response.tokens) for response in responses),
    }
    of_tokens = [response.largest_token_difference for response in responses]
    if None not in of_tokens:
        found["sampler_logprob_largest_difference"] = max(of_tokens, default=0.0)
    return found


def _weights(rollouts: Sequence[Rollout], objective: Objective, strength: float) -> dict[str, float]:
    """Sums over groups. If the policy were still the one that drew, the trainer's beta would be 1/n."""
    found = {"groups": float(len(rollouts)), **dict.fromkeys(WEIGHTS, 0.0)}
    for rollout in rollouts:
        needed = [name for name in objective.needs if name != "log_proposal"]
        numbers = rollout.numbers([*needed, *_SIDES.values()])
        alphas = {side: _alpha(objective, numbers, name) for side, name in _SIDES.items()}
        beta = policy_log_weights(numbers["trainer_logprob"], numbers["sampler_logprob"], strength=strength)
        for side, alpha in alphas.items():
            found[f"ess_alpha_{side}"] += effective_sample_size(alpha.log()).item()
        found["ess_beta_engine"] += effective_sample_size(beta).item()
        changes = (alphas["trainer"] - alphas["engine"], beta.exp() - 1.0 / len(beta))
        largest = torch.stack(changes).abs().max().item()
        found["largest_weight_change"] = max(found["largest_weight_change"], largest)
    return found


def _alpha(objective: Objective, numbers: Mapping[str, Tensor], log_proposal: str) -> Tensor:
    return objective.fix({**numbers, "log_proposal": numbers[log_proposal]})


def _require_close(difference: float, limit: float) -> None:
    if not difference <= limit:
        raise RuntimeError(
            f"log q' of the trainer and of the sampler differ by {difference:.3g} nats per token on average (limit "
            f"--max-sampler-difference {limit:g}): the key/value cache, positions or temperature of sampling are not "
            "those of training"
        )
