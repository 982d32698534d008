"""Statistical rejection sampling (RSO, Liu et al. 2023, arXiv 2309.06657, algorithm 1). It chooses responses of the
posterior `p(y|x) exp(r(x,y) / tau)` from samples of the prior."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from megatron_brain.errors import ConfigError
from megatron_brain.generation.seeds import draw_uniforms, sample_seed
from megatron_brain.stages.brain.placement import Placement
from megatron_brain.stages.brain.proposals import SampledResponses
from megatron_brain.stages.brain.rollouts import Rollout
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all
from megatron_brain.training.trainer import Trainer

_SAMPLE_KEY = -1
"""Key of a prompt's stream of draws. No sample has this key."""


def accept(rewards: Sequence[float], count: int, *, temperature: float, uniforms: Sequence[float]) -> list[int]:
    """Choose candidates without replacement.

    The candidates are shuffled. A pass goes through those that are left and accepts each with probability
    `exp((r - r_max) / tau)`, where r_max is the largest reward of those that are left when the pass begins. Passes
    follow each other until `count` are accepted. Each pass accepts the best that is left, so there are at most `count`
    passes. For small tau the best are accepted, for large tau all are accepted with equal probability.

    Args:
        rewards: rewards of the candidates, which are distinct.
        count: how many candidates to accept, at most all.
        temperature: tau > 0.
        uniforms: `num_draws` uniform draws in [0, 1).

    Returns:
        indices of the accepted candidates, in random order, so that neighbours are random pairs.
    """
    draws = iter(uniforms)
    left = _shuffled(range(len(rewards)), draws)
    accepted: list[int] = []
    while len(accepted) < count:
        best, rejected = max(rewards[i] for i in left), []
        for i in left:
            enough = len(accepted) == count
            is_accepted = not enough and next(draws) < math.exp((rewards[i] - best) / temperature)
            (accepted if is_accepted else rejected).append(i)
        left = rejected
    return _shuffled(accepted, draws)


def num_draws(candidates: int, count: int) -> int:
    """The most draws that `accept` needs: two shuffles, and one per candidate in each of `count` passes."""
    return candidates + count + candidates * count


def _shuffled(items: Sequence[int], draws: Iterator[float]) -> list[int]:
    return [item for _, item in sorted((next(draws), item) for item in items)]


class RejectionSamples:
    """Responses of the prior that rejection sampling has accepted. Nobody knows log q' of accepted responses."""

    from_prior = True
    temperature = None

    def __init__(
        self, run: Run, placement: Placement, samples: SampledResponses, rewards: Rewards, scale: Scale
    ) -> None:
        self._run, self._placement, self._rewards, self._scale = run, placement, rewards, scale
        self._samples = samples
        self.num_prompts, self.groups_per_round = self._samples.num_prompts, self._samples.groups_per_round
        self.metrics: dict[str, float] = {}

    def rounds(self, epochs: float) -> int:
        """Number of rounds in `epochs` passes over the prompts, rounded up."""
        return self._samples.rounds(epochs)

    def rollouts(self, trainer: Trainer, number: int) -> list[Rollout]:
        """Draw this replica's candidates of a round, score them, and accept some.

        Raises:
            AgreedError: on all ranks, if a prompt has too few distinct candidates.
        """
        config = self._run.config
        drawn = self._samples.draw(trainer, number, samples_per_prompt=config.brain.rso_candidates)
        for rollout in drawn:
            rollout.responses = list({response.tokens: response for response in rollout.responses}.values())
        at_once = config.training.micro_batch_size * config.sampling.samples_per_prompt
        steps = [self._placement.alone(rollout, at_once=at_once) for rollout in drawn]
        self._rewards.score(steps, self._scale)
        distinct = torch.tensor([sum(len(rollout.responses) for rollout in drawn), len(drawn)], dtype=torch.float64)
        total, prompts = self._run.parallel.sum_over_data_parallel(distinct.to(self._run.parallel.device)).tolist()
        self.metrics = {**self._samples.metrics, "distinct_candidates": total / prompts}
        first = number * self.groups_per_round
        return read_on_all(
            lambda: [self._choose(rollout, key=first + rollout.index) for rollout in drawn], self._run.parallel
        )

    def _choose(self, candidates: Rollout, *, key: int) -> Rollout:
        """The rollout with the accepted responses only.

        Args:
            candidates: a rollout with distinct, scored responses.
            key: the prompt's place in the endless stream of prompts. It seeds the choice.
        """
        responses, settings = candidates.responses, self._run.config.brain
        count = self._run.config.sampling.samples_per_prompt
        if not all(math.isfinite(response.reward) for response in responses):
            raise ConfigError(f"{candidates.id}: a candidate's reward is not finite: give another reward")
        if len(responses) < count:
            if not settings.rso_fewer_pairs:
                raise ConfigError(
                    f"{candidates.id}: {len(responses)} of {settings.rso_candidates} candidates are distinct, and "
                    f"samples_per_prompt={count} are wanted: raise --rso-candidates or --temperature, lower "
                    "--samples-per-prompt, or give --rso-fewer-pairs"
                )
            count = len(responses) - len(responses) % 2
        chosen = accept(
            [response.reward for response in responses],
            count,
            temperature=self._run.config.posterior.reward_temperature,
            uniforms=draw_uniforms(
                sample_seed(self._run.config.training.seed, key, _SAMPLE_KEY), num_draws(len(responses), count)
            ).tolist(),
        )
        # A single response makes a pair with itself, which is a tie.
        accepted = [responses[i] for i in chosen] or responses * 2
        # What the sampler says is the probability of being drawn, not that of being accepted.
        unknown = {"sampler_logprob": None, "sampler_token_logprobs": None}
        return dataclasses.replace(
            candidates, responses=[dataclasses.replace(response, **unknown) for response in accepted]
        )
