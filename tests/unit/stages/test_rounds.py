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


def maker(**run):
    config = RunConfig(stage="brain")
    parallel = SimpleNamespace(
        sum_over_data_parallel=lambda values: values,
        gather_over_data_parallel=lambda item: [item],
        device=torch.device("cpu"),
    )
    made = object.__new__(RoundMaker)
    made._settings, made._ahead = config.brain, None
    made._run = SimpleNamespace(config=config, parallel=parallel, resuming=False, **run)
    return made


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
    assert made.proposal_is_policy(number) is expected
    if from_prior:
        made._run.config.scoring.prior_load = "another"
        assert made.proposal_is_policy(number) is False


def test_the_proposal_is_not_the_policy_where_the_engine_says_log_q_or_has_drawn_ahead():
    made = maker()
    made.proposal = SimpleNamespace(temperature=1.0, from_prior=False)
    made._ahead = made.proposal
    assert [made.proposal_is_policy(number) for number in range(3)] == [True, False, False]
    made._ahead, made._settings.proposal_logprobs = None, "engine"
    assert not made.proposal_is_policy(0)


def test_the_log_q_that_makes_the_weights_is_the_trainers_or_the_engines(monkeypatch):
    def score_tokens(run, steps, chunks, **_):
        yield from ((response, -4.0, torch.tensor([-4.0])) for response in some.responses)

    monkeypatch.setattr(rounds, "score_tokens", score_tokens)
    for side, expected in (("trainer", -4.0), ("engine", -3.0)):
        some = Rollout(id="p", index=0, prompt_tokens=(1,), responses=[Response(tokens=(1,), sampler_logprob=-3.0)])
        made = maker()
        made._settings.proposal_logprobs = side
        made._objective = OBJECTIVES["brain"]
        made.proposal = SimpleNamespace(temperature=1.0, from_prior=False)
        made._score_proposal(SimpleNamespace(gathered_chunks=list), [], [some], 3)
        [response] = some.responses
        assert (response.log_proposal, response.trainer_logprob, response.sampler_logprob) == (expected, -4.0, -3.0)


BY_POLICY, BY_PRIOR = ("trainer_logprob", "policy"), ("trainer_logprob", "prior")
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

    def score_tokens(*arguments, **options):
        yield from ((*scored, torch.zeros(1)) for scored in score_responses(*arguments, head="policy", **options))

    monkeypatch.setattr(rounds, "score_responses", score_responses)
    monkeypatch.setattr(rounds, "score_tokens", score_tokens)
    some = Rollout(id="p", index=0, prompt_tokens=(1,), responses=[Response(tokens=(1,)), Response(tokens=(2,))])
    if temperature is None and objective == "brain":
        for response in some.responses:
            response.log_proposal = -2.0
    made = maker()
    made._objective = OBJECTIVES[objective]
    made.proposal = SimpleNamespace(temperature=temperature, from_prior=from_prior)
    made.prior = SimpleNamespace(loaded=lambda: contextlib.nullcontext("prior"))
    made.rewards, made.reward_scale = SimpleNamespace(score=score_with_rewards), None
    made._score(SimpleNamespace(gathered_chunks=lambda: "policy"), [], [some], number)
    names = ("trainer_logprob", "log_prior", "reward")
    scored = [
        (next(name for name in names if some.values(name) == (-float(10 + call),) * 2), chunks)
        for call, chunks in enumerate(calls, 1)
    ]
    assert scored == expected
    assert all(None not in some.values(name) for name in OBJECTIVES[objective].needs)
