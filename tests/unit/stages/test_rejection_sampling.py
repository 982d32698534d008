"""Rejection sampling accepts with the probabilities of the algorithm, and by seed and prompt alone."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron_brain.config.run import RunConfig
from megatron_brain.errors import ConfigError
from megatron_brain.generation.seeds import draw_uniforms, sample_seed
from megatron_brain.stages.brain.placement import Placement
from megatron_brain.stages.brain.rejection_sampling import RejectionSamples, accept, num_draws
from megatron_brain.stages.brain.rollouts import Response, Rollout

REWARDS = (0.3, -0.4, 1.0, 0.7)


def chosen(rewards, count, temperature, *, seed=0, key=0):
    draws = draw_uniforms(sample_seed(seed, key, -1), num_draws(len(rewards), count)).tolist()
    return accept(rewards, count, temperature=temperature, uniforms=draws)


def exact(rewards, count, tau):
    """Probability of every set of `count` candidates, by going through all orders and all outcomes of every trial."""
    found = Counter()

    def one_pass(rest, accepted, rejected, best, probability):
        if len(accepted) == count:
            found[frozenset(accepted)] += probability
        elif not rest:
            begin(rejected, accepted, probability)
        else:
            first, *others = rest
            p = math.exp((rewards[first] - best) / tau)
            one_pass(others, [*accepted, first], rejected, best, probability * p)
            if p < 1:
                one_pass(others, accepted, [*rejected, first], best, probability * (1 - p))

    def begin(left, accepted, probability):
        one_pass(left, accepted, [], max(rewards[i] for i in left), probability)

    orders = list(itertools.permutations(range(len(rewards))))
    for order in orders:
        begin(list(order), [], 1 / len(orders))
    return found


def chi_square(counts, probabilities, total):
    assert set(counts) <= set(probabilities)
    return sum((counts[key] - total * p) ** 2 / (total * p) for key, p in probabilities.items())


@pytest.mark.parametrize(("count", "tau"), [(1, 0.5), (2, 0.5), (2, 2.0), (3, 0.3)])
def test_sets_are_accepted_with_the_probabilities_of_the_algorithm(count, tau):
    total = 20_000
    probabilities = exact(REWARDS, count, tau)
    assert sum(probabilities.values()) == pytest.approx(1)
    counts = Counter(frozenset(chosen(REWARDS, count, tau, key=key)) for key in range(total))
    # 99.9th percentile of chi-square with the number of sets less one, at most 5, degrees of freedom: 20.5
    assert chi_square(counts, probabilities, total) < 20.5


def test_one_accepted_response_of_many_is_a_sample_of_the_posterior():
    """Its probability is exp(r / tau) over their sum only where one is accepted from endless candidates: here of many
    candidates with two rewards, the share of the better ones."""
    tau, total = 0.7, 4000
    rewards = [1.0, 0.0] * 100
    better = sum(rewards[chosen(rewards, 1, tau, key=key)[0]] for key in range(total)) / total
    expected = math.exp(1 / tau) / (math.exp(1 / tau) + 1)
    assert better == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / total))


def test_a_small_temperature_takes_the_best_and_a_large_one_anybody():
    rewards = numpy.random.default_rng(0).normal(size=12).tolist()
    best = sorted(range(12), key=lambda i: -rewards[i])[:4]
    assert all(sorted(chosen(rewards, 4, 1e-300, key=key)) == sorted(best) for key in range(50))
    total = 12_000
    counts = Counter(i for key in range(total) for i in chosen(rewards, 4, 1e9, key=key))
    # Each with probability 1/3: 11 degrees of freedom, 99.9th percentile 31.3; drawing without replacement lowers it.
    assert sum((counts[i] - total / 3) ** 2 / (total / 3) for i in range(12)) < 31.3


def test_neighbours_are_random_pairs_of_the_accepted():
    """All are accepted here, the better ones in earlier passes: their order must not show that."""
    total = 12_000
    orders = Counter(tuple(chosen(REWARDS, 4, 0.2, key=key)) for key in range(total))
    # 24 orders, 23 degrees of freedom, 99.9th percentile 49.7
    assert chi_square(orders, dict.fromkeys(itertools.permutations(range(4)), 1 / 24), total) < 49.7


def test_the_choice_follows_from_seed_and_prompt_alone():
    first = [chosen(REWARDS, 2, 0.5, seed=3, key=key) for key in range(40)]
    assert first == [chosen(REWARDS, 2, 0.5, seed=3, key=key) for key in range(40)]
    assert first != [chosen(REWARDS, 2, 0.5, seed=4, key=key) for key in range(40)]
    assert len({tuple(choice) for choice in first}) > 3


def test_as_many_draws_as_are_promised_are_enough():
    # Every pass accepts the best alone: the most draws there can be.
    accept(list(range(9)), 9, temperature=1e-9, uniforms=[0.999] * num_draws(9, 9))


def candidates(*rewards, tokens=None):
    """A rollout of distinct candidates, or of those with these tokens."""
    tokens = tokens or [(i + 1,) for i in range(len(rewards))]
    responses = [
        Response(tokens=ids, reward=reward, sampler_logprob=-1.0) for ids, reward in zip(tokens, rewards, strict=True)
    ]
    return Rollout(id="prompts.jsonl:7", index=3, prompt_tokens=(1, 2), responses=responses)


def proposal(*, samples=4, number_of_candidates=8, drawn=(), reward_temperature=1.0, **brain):
    """Rejection sampling of what was drawn, without a model: responses that have no reward get their first token."""
    config = RunConfig(stage="brain")
    config.sampling.samples_per_prompt, config.brain.rso_candidates = samples, number_of_candidates
    config.posterior.reward_temperature = reward_temperature
    for name, value in brain.items():
        setattr(config.brain, name, value)
    layout = SimpleNamespace(
        dp_rank=0,
        dp_size=1,
        tp_size=1,
        pp_size=1,
        device=torch.device("cpu"),
        gather_over_world=lambda item: [item],
        sum_over_data_parallel=lambda values: values,
    )
    made = RejectionSamples.__new__(RejectionSamples)
    made._run, made.groups_per_round = SimpleNamespace(config=config, parallel=layout), 16
    made._placement = Placement(config.training, layout, interleaved=False)
    made._samples = SimpleNamespace(metrics={}, draw=lambda trainer, number, samples_per_prompt: list(drawn))
    return made


def test_duplicates_are_one_candidate_and_only_distinct_ones_are_scored():
    scored = []

    def score(steps, scale):
        for [part] in itertools.chain(*steps):
            for response in (part.rollout.responses[i] for i in part.responses):
                scored.append(response.tokens)
                response.reward = float(response.tokens[0])

    drawn = candidates(*[None] * 6, tokens=[(1,), (2,), (1,), (3,), (2,), (1, 1)])
    made = proposal(samples=2, number_of_candidates=6, drawn=[drawn], reward_temperature=1e-6)
    made._rewards, made._scale = SimpleNamespace(score=score), None
    [rollout] = made.rollouts(None, 0)
    assert scored == [(1,), (2,), (3,), (1, 1)] and made.metrics == {"distinct_candidates": 4.0}
    assert sorted(response.tokens for response in rollout.responses) == [(2,), (3,)]
    assert [response.reward for response in rollout.responses] == [response.tokens[0] for response in rollout.responses]
    assert rollout.values("sampler_logprob") == (None, None), "nobody knows the probability of what was accepted"


def test_too_few_distinct_candidates_stop_the_run_with_the_prompt_and_the_cure():
    with pytest.raises(ConfigError, match=r"prompts.jsonl:7: 3 of 8 candidates are distinct.* --rso-fewer-pairs"):
        proposal()._choose(candidates(1.0, 2.0, 3.0), key=0)


@pytest.mark.parametrize(("distinct", "expected"), [(3, 2), (2, 2), (4, 4)])
def test_or_fewer_pairs_are_made_where_that_is_asked_for(distinct, expected):
    rollout = proposal(rso_fewer_pairs=True)._choose(candidates(*range(distinct)), key=0)
    assert len({response.tokens for response in rollout.responses}) == len(rollout.responses) == expected


def test_a_prompt_with_one_distinct_answer_becomes_a_tie():
    first, second = proposal(rso_fewer_pairs=True)._choose(candidates(0.5), key=0).responses
    assert first == second and first is not second


def test_a_reward_that_is_not_finite_is_named_with_the_prompt():
    with pytest.raises(ConfigError, match=r"prompts.jsonl:7: a candidate's reward is not finite"):
        proposal(samples=2)._choose(candidates(1.0, math.nan), key=0)


def test_the_same_prompt_met_again_gets_another_choice():
    made = proposal(samples=2)
    choices = {tuple(r.tokens for r in made._choose(candidates(0, 0, 0, 0, 0), key=key).responses) for key in (3, 19)}
    assert len(choices) == 2
