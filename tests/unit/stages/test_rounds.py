"""What a round checks of the numbers it gathers."""

from types import SimpleNamespace

import pytest
import torch

from megatron_brain.config.run import RunConfig
from megatron_brain.stages.brain.rollouts import Response, Rollout
from megatron_brain.stages.brain.rounds import RoundMaker


def maker(limit=0.1, **run):
    config = RunConfig(stage="brain")
    config.brain.max_sampler_difference = limit
    parallel = SimpleNamespace(sum_over_data_parallel=lambda values: values, device=torch.device("cpu"))
    made = SimpleNamespace(
        _settings=config.brain, _run=SimpleNamespace(config=config, parallel=parallel, resuming=False, **run)
    )
    made._total = lambda value: RoundMaker._total(made, value)
    made._policy_is_prior = lambda number: RoundMaker._policy_is_prior(made, number)
    return made


def rollout(*differences):
    responses = [Response(tokens=(1, 2), sampler_logprob=-3.0, log_proposal=-3.0 + d) for d in differences]
    return Rollout(id="p", index=0, prompt_tokens=(1,), responses=responses)


def test_the_samplers_log_probabilities_are_compared_per_token():
    # |0.1| + |-0.3| nats over 4 tokens
    assert RoundMaker._sampler_difference(maker(), [rollout(0.1, -0.3)], 4) == pytest.approx(0.1)


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_difference_over_the_limit_stops_the_run_with_the_numbers(difference):
    with pytest.raises(RuntimeError, match="nats per token on average .limit --max-sampler-difference 0.1"):
        RoundMaker._sampler_difference(maker(), [rollout(difference, 0.0)], 4)


@pytest.mark.parametrize(
    ("temperature", "from_prior", "number", "expected"),
    [
        (1.0, False, 3, True),
        (1.0, True, 0, True),
        (1.0, True, 1, False),
        (0.7, False, 0, False),
        (None, False, 0, False),
    ],
)
def test_the_proposal_is_the_policy_after_a_refresh_with_plain_sampling(temperature, from_prior, number, expected):
    made = maker()
    made.proposal = SimpleNamespace(temperature=temperature, from_prior=from_prior)
    assert RoundMaker.proposal_is_policy(made, number) is expected
    if from_prior:
        made._run.config.scoring.prior_load = "another"
        assert RoundMaker.proposal_is_policy(made, number) is False
