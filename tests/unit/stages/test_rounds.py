"""What a round checks of the numbers it gathers."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from megatron_brain.config.run import RunConfig
from megatron_brain.objectives.registry import OBJECTIVES
from megatron_brain.stages.brain import rounds
from megatron_brain.stages.brain.rollouts import Response, Rollout
from megatron_brain.stages.brain.rounds import RoundMaker


def maker(limit=0.1, **run):
    config = RunConfig(stage="brain")
    config.brain.max_sampler_difference = limit
    parallel = SimpleNamespace(
        sum_over_data_parallel=lambda values: values,
        gather_over_data_parallel=lambda item: [item],
        device=torch.device("cpu"),
    )
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


BY_POLICY, BY_PRIOR = ("log_proposal", "policy"), ("log_proposal", "prior")
LOG_PRIOR, REWARD = ("log_prior", "prior"), ("reward", "reward")


@pytest.mark.parametrize(
    ("objective", "temperature", "from_prior", "number", "expected"),
    [
        ("brain", 1.0, False, 0, [BY_POLICY, REWARD]),
        ("brain", 1.0, False, 1, [BY_POLICY, LOG_PRIOR, REWARD]),
        ("brain", 1.0, True, 1, [BY_PRIOR, REWARD]),
        ("brain", 0.7, False, 0, [BY_POLICY, LOG_PRIOR, REWARD]),
        ("brain", None, False, 1, [LOG_PRIOR, REWARD]),
        ("rloo", 1.0, False, 1, [BY_POLICY, LOG_PRIOR, REWARD]),
        # Where log q' is log p it takes no pass of its own.
        ("dpo", 1.0, False, 0, [BY_POLICY, REWARD]),
        ("dpo", 1.0, True, 1, [BY_PRIOR, REWARD]),
        ("dpo", 1.0, False, 1, [LOG_PRIOR, REWARD]),
        ("dpo", 0.7, True, 1, [LOG_PRIOR, REWARD]),
        ("dpo", None, True, 0, [LOG_PRIOR, REWARD]),
    ],
)
def test_only_what_the_objective_needs_is_scored(objective, temperature, from_prior, number, expected, monkeypatch):
    calls = []

    def score_responses(run, steps, chunks, *, head, temperature=1.0):
        calls.append(chunks)
        yield from [(response, -float(10 + len(calls))) for response in some.responses]

    def score_with_rewards(steps, scale):
        for response, value in score_responses(None, steps, "reward", head="reward"):
            response.reward = value

    monkeypatch.setattr(rounds, "score_responses", score_responses)
    some = Rollout(id="p", index=0, prompt_tokens=(1,), responses=[Response(tokens=(1,)), Response(tokens=(2,))])
    if temperature is None and objective == "brain":
        for response in some.responses:
            response.log_proposal = -2.0
    made = maker()
    made._objective = OBJECTIVES[objective]
    made._is_missing = lambda name, rollouts: RoundMaker._is_missing(made, name, rollouts)
    made.proposal = SimpleNamespace(temperature=temperature, from_prior=from_prior)
    made.prior = SimpleNamespace(loaded=lambda: contextlib.nullcontext("prior"))
    made.rewards, made.reward_scale = SimpleNamespace(score=score_with_rewards), None
    rescored = RoundMaker._score(made, SimpleNamespace(gathered_chunks=lambda: "policy"), [], [some], number)
    names = ("log_proposal", "log_prior", "reward")
    scored = [
        (next(name for name in names if some.values(name) == (-float(10 + call),) * 2), chunks)
        for call, chunks in enumerate(calls, 1)
    ]
    assert scored == expected and rescored == (expected[0][0] == "log_proposal")
    assert all(None not in some.values(name) for name in OBJECTIVES[objective].needs)
