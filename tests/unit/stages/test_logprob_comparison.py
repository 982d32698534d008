"""log q' of trainer and engine side by side, and what each makes of the weights."""

import math
from types import SimpleNamespace

import pytest

from megatron_brain.objectives.brain import Brain
from megatron_brain.objectives.rloo import RLOO
from megatron_brain.stages.brain.logprob_comparison import DIFFERENCES, WEIGHTS, compare_logprobs
from megatron_brain.stages.brain.rollouts import Response, Rollout

ALONE = SimpleNamespace(gather_over_data_parallel=lambda item: [item])
BRAIN = Brain(baseline="self-normalized", alpha="soft", policy_strength=1.0, reward_temperature=1.0)


def rollout(*numbers):
    """A group of responses of two tokens with log q' of trainer and engine, log p and reward."""
    names = ("trainer_logprob", "sampler_logprob", "log_prior", "reward")
    responses = []
    for values in numbers:
        response = Response(tokens=(1, 2), **dict(zip(names, values, strict=True)))
        # The first token of the trainer is 0.2 below that of the sampler; the second one has the rest.
        sampler, trainer = response.sampler_logprob, response.trainer_logprob
        response.sampler_token_logprobs = (-0.5, sampler + 0.5)
        response.compare_tokens((-0.7, trainer + 0.7))
        responses.append(response)
    return Rollout(id="p", index=0, prompt_tokens=(1,), responses=responses)


def softmax(*values):
    return [math.exp(value) / sum(map(math.exp, values)) for value in values]


def ess(weights):
    return 1 / sum(weight**2 for weight in weights)


def test_the_differences_and_weights_of_a_group_by_hand():
    group = rollout((-2.0, -2.1, -1.0, 0.5), (-3.0, -2.7, -2.0, 0.0))
    found = compare_logprobs([group], BRAIN, ALONE, strength=1.0, limit=1.0)
    trainer, engine = softmax(-1 + 0.5 + 2, -2 + 3), softmax(-1 + 0.5 + 2.1, -2 + 2.7)
    beta = softmax(0.1, -0.3)
    assert found == pytest.approx(
        {
            "sampler_logprob_difference": 0.4 / 4,
            "sampler_logprob_largest_difference": 0.3,
            "ess_alpha_trainer": ess(trainer),
            "ess_alpha_engine": ess(engine),
            "ess_beta_engine": ess(beta),
            "largest_weight_change": max(abs(trainer[0] - engine[0]), abs(beta[0] - 0.5)),
        },
        rel=1e-5,
    )
    assert found.keys() == {*DIFFERENCES, *WEIGHTS}


def test_replicas_are_joined_to_means_over_all_groups_and_maxima():
    one = rollout((-2.0, -2.1, -1.0, 0.5), (-3.0, -2.7, -2.0, 0.0))
    other = rollout((-2.0, -2.0, -1.0, 0.5), (-3.0, -2.4, -2.0, 0.0))
    shares = []
    for share in ([one], [other]):
        keep = SimpleNamespace(gather_over_data_parallel=lambda item: shares.append(item) or [item])
        compare_logprobs(share, BRAIN, keep, strength=1.0, limit=1.0)
    both = SimpleNamespace(gather_over_data_parallel=lambda item: shares)
    assert compare_logprobs([one], BRAIN, both, strength=1.0, limit=1.0) == pytest.approx(
        compare_logprobs([one, other], BRAIN, ALONE, strength=1.0, limit=1.0)
    )


def test_the_largest_difference_is_left_out_where_a_response_of_any_replica_lacks_it():
    known, unknown = (rollout((-2.0, -2.1, -1.0, 0.5), (-3.0, -2.7, -2.0, 0.0)) for _ in range(2))
    unknown.responses[1].largest_token_difference = None
    shares = []
    for share in ([known], [unknown]):
        keep = SimpleNamespace(gather_over_data_parallel=lambda item: shares.append(item) or [item])
        compare_logprobs(share, BRAIN, keep, strength=1.0, limit=1.0)
    both = SimpleNamespace(gather_over_data_parallel=lambda item: shares)
    expected = compare_logprobs([known], BRAIN, ALONE, strength=1.0, limit=1.0)
    del expected["sampler_logprob_largest_difference"]
    for mine in (known, unknown):
        assert compare_logprobs([mine], BRAIN, both, strength=1.0, limit=1.0) == pytest.approx(expected)


def test_an_objective_without_alpha_has_the_differences_alone():
    group = rollout((-2.0, -2.1, -1.0, 0.5), (-3.0, -2.7, -2.0, 0.0))
    found = compare_logprobs([group], RLOO(kl_coefficient=0.1, clip_ratio=0.2), ALONE, strength=1.0, limit=1.0)
    assert found.keys() == set(DIFFERENCES)


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_difference_over_the_limit_stops_the_run_with_the_numbers(difference):
    group = rollout((-2.0 + difference, -2.0, -1.0, 0.5), (-3.0, -3.0, -2.0, 0.0))
    with pytest.raises(RuntimeError, match="nats per token on average .limit --max-sampler-difference 0.1"):
        compare_logprobs([group], RLOO(kl_coefficient=0.1, clip_ratio=0.2), ALONE, strength=1.0, limit=0.1)
