"""The sources of a round's responses: drawn by a policy, given as preference pairs, or read from files.

Each is a `Proposal`. Rejection sampling is one too and has its own file. Besides the responses, a proposal says how
log q' of the distribution that they were drawn from becomes known.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import TRAIN_DATA
from megatron_brain.data.order import SampleOrder
from megatron_brain.data.records import Prompt
from megatron_brain.errors import ConfigError
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.engine import THE_PRIOR, Engine
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.brain.objectives import objective_of
from megatron_brain.stages.brain.placement import Placement
from megatron_brain.stages.brain.rollouts import Response, Rollout, read_rollouts, rollout_files
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import read_on_all, require_same_rollouts
from megatron_brain.training.trainer import Trainer


class Proposal(Protocol):
    """A source of responses, which it gives round by round."""

    num_prompts: int
    """Number of prompts in one pass over the data; 0 if rounds are files."""
    groups_per_round: int
    from_prior: bool
    """Whether q' is the prior. Otherwise it is the policy at the start of the round."""
    temperature: float | None
    """Temperature at which the model that trains computes log q'. None: the rollouts bring log q' along, or nobody
    knows it."""
    metrics: Mapping[str, float]
    """Metrics of the last round, the same on all ranks."""

    def rounds(self, epochs: float) -> int:
        """Number of rounds in `epochs` passes over the data."""

    def rollouts(self, trainer: Trainer, number: int) -> list[Rollout]:
        """The rollouts of a round that `Placement.deal` gives to this replica."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """This replica's prompts of a round, and a seed for each of their responses."""

    number: int
    places: Sequence[int]
    prompts: Sequence[Prompt]
    seeds: Sequence[Sequence[int]]


class SampledResponses:
    """Draws responses from the policy as it is at the start of the round, or always from the prior."""

    def __init__(
        self, run: Run, placement: Placement, prior: FrozenModel, engine: Engine, prompts: Sequence[Prompt]
    ) -> None:
        self._run, self._placement, self._prior, self._engine = run, placement, prior, engine
        sampling = run.config.sampling
        self._prompts = prompts
        self._order = SampleOrder(len(self._prompts), seed=run.config.training.seed)
        self.num_prompts = len(self._prompts)
        self.groups_per_round = run.config.brain.prompts_per_round
        self.from_prior = not run.config.brain.refresh_proposal
        # If top-p or top-k cuts the distribution, only the sampler knows the probabilities that it drew with.
        truncated = sampling.top_p != 1.0 or sampling.top_k != 0
        self.temperature = None if truncated else sampling.temperature
        self.metrics: dict[str, float] = {}

    def rounds(self, epochs: float) -> int:
        """Number of rounds in `epochs` passes over the prompts, rounded up."""
        return math.ceil(epochs * self.num_prompts / self.groups_per_round)

    def rollouts(self, trainer: Trainer, number: int) -> list[Rollout]:
        """Draw this replica's samples of a round."""
        return self.draw(trainer, number, samples_per_prompt=self._run.config.sampling.samples_per_prompt)

    def draw(self, trainer: Trainer, number: int, *, samples_per_prompt: int) -> list[Rollout]:
        """Draw `samples_per_prompt` samples of each of this replica's prompts of a round."""
        asked, sampling = self._asked(number, samples_per_prompt), self._run.config.sampling
        with self._model(trainer) as chunks:
            start = time.perf_counter()
            self._hand_over(trainer, chunks)
            handed_over = time.perf_counter()
            drawn = self._engine.sample(
                [prompt.tokens for prompt in asked.prompts], seeds=asked.seeds, sampling=sampling
            )
        self._measure(sync=handed_over - start, drawing=time.perf_counter() - handed_over)
        return self._as_rollouts(asked, drawn)

    def _asked(self, number: int, samples_per_prompt: int) -> Asked:
        count = self.groups_per_round
        # The place in the endless stream of prompts seeds the samples too: a prompt that comes again gets new ones.
        places = self._placement.deal(range(number * count, (number + 1) * count))
        return Asked(
            number=number,
            places=places,
            prompts=[self._prompts[self._order[place]] for place in places],
            seeds=sample_seeds(self._run.config.training.seed, places, samples_per_prompt),
        )

    def _hand_over(self, trainer: Trainer, chunks: Sequence[Chunk]) -> None:
        """Give the engine the weights, unless it has them."""
        label = THE_PRIOR if self.from_prior else f"iteration {trainer.iteration}"
        if not (self._engine.keeps_weights and self._engine.holds == label):
            self._engine.take_weights(chunks, label)

    def _measure(self, *, sync: float, drawing: float, waiting: float | None = None) -> None:
        self.metrics = {"seconds_sampling": drawing}
        if self._engine.keeps_weights:
            waiting = drawing if waiting is None else waiting
            self.metrics |= {"seconds_weight_sync": sync, "seconds_waiting_for_samples": waiting}

    def _as_rollouts(self, asked: Asked, drawn: Sequence[Sequence[Completion]]) -> list[Rollout]:
        first, tokenizer = asked.number * self.groups_per_round, self._run.tokenizer
        return [
            Rollout(
                id=prompt.record_id,
                index=place - first,
                prompt_tokens=prompt.tokens,
                prompt=prompt.text,
                record=prompt.record,
                responses=[
                    Response(
                        tokens=sample.tokens,
                        text=tokenizer.decode_response(sample.tokens),
                        finished=sample.finished,
                        sampler_logprob=sample.logprob,
                        sampler_token_logprobs=sample.token_logprobs if self.temperature is not None else None,
                        log_proposal=sample.logprob if self.temperature is None else None,
                    )
                    for sample in samples
                ],
            )
            for prompt, place, samples in zip(asked.prompts, asked.places, drawn, strict=True)
        ]

    @contextlib.contextmanager
    def _model(self, trainer: Trainer) -> Iterator[Sequence[Chunk]]:
        if not self.from_prior:
            yield trainer.gathered_chunks()
            return
        with self._prior.loaded() as chunks:
            yield chunks


class GivenPairs:
    """Takes the chosen and the rejected response of preference records as if they were two samples of the prior.

    The reward of chosen is 1, that of rejected 0; only their order matters. With `--alpha hard` BRAIn is DPO.
    """

    metrics: Mapping[str, float] = {}
    from_prior = True
    temperature = 1.0

    def __init__(self, run: Run, placement: Placement) -> None:
        self._placement, self._tokenizer = placement, run.tokenizer
        self._pairs = run.read(TRAIN_DATA)
        self._order = SampleOrder(len(self._pairs), seed=run.config.training.seed)
        self.num_prompts = len(self._pairs)
        self.groups_per_round = run.config.brain.prompts_per_round

    def rounds(self, epochs: float) -> int:
        """Number of rounds in `epochs` passes over the pairs, rounded up."""
        return math.ceil(epochs * self.num_prompts / self.groups_per_round)

    def rollouts(self, trainer: Trainer, number: int) -> list[Rollout]:
        """This replica's pairs of a round."""
        count = self.groups_per_round
        rollouts = []
        for place in self._placement.deal(range(number * count, (number + 1) * count)):
            group = self._pairs[self._order[place]].group
            rollouts.append(
                Rollout(
                    id=group.record_id,
                    index=place - number * count,
                    prompt_tokens=group.prompt,
                    prompt=self._tokenizer.decode(group.prompt),
                    responses=[
                        Response(
                            tokens=tokens,
                            text=self._tokenizer.decode_response(tokens),
                            finished=tokens[-1] == self._tokenizer.eos_id,
                            reward=reward,
                        )
                        for tokens, reward in zip(group.responses, (1.0, 0.0), strict=True)
                    ],
                )
            )
        return rollouts


class RolloutFiles:
    """Reads rollouts that any engine has written. Each file is a round."""

    metrics: Mapping[str, float] = {}
    num_prompts = 0
    from_prior = False
    temperature = None

    def __init__(self, run: Run, placement: Placement) -> None:
        self._run, self._placement = run, placement
        self._files = rollout_files(run.config.brain.rollout_data)
        # All files are checked now: an error in the last file must not stop a run after days.
        groups = {path: len(self._read(path)) for path in self._files}
        self.groups_per_round = groups_per_round(run.config, groups)

    def rounds(self, epochs: float) -> int:
        """One round per file, for any `epochs`."""
        return len(self._files)

    def rollouts(self, trainer: Trainer, number: int) -> list[Rollout]:
        """Read this replica's rollouts of a round. After the last file comes the first one again."""
        path = self._files[number % len(self._files)]
        rollouts = self._read(path)
        require_same_rollouts(rollouts, path, self._run.parallel)
        return self._placement.deal([dataclasses.replace(rollout, index=i) for i, rollout in enumerate(rollouts)])

    def _read(self, path: str) -> list[Rollout]:
        return read_on_all(lambda: read_round(self._run.config, path), self._run.parallel)


def groups_per_round(config: RunConfig, groups: Mapping[str, int]) -> int:
    """Groups of a round of a run over rollout files.

    Args:
        config: the run's settings.
        groups: number of groups by file, in the order of the rounds.

    Raises:
        ConfigError: the files hold different numbers of groups, and nothing says how many steps a round has.
    """
    (first, count), *others = groups.items()
    for other, of_other in others:
        if of_other != count and config.brain.refresh_interval is None:
            raise ConfigError(
                f"{other} holds {of_other} groups and {first} {count}: a round has as many steps as the first file "
                "fills. Give files of as many groups, or the steps of a round (--refresh-interval)"
            )
    return count


def read_round(config: RunConfig, path: str) -> list[Rollout]:
    """All rollouts of a file.

    Raises:
        ConfigError: they do not fill whole batches, do not fit the model's vocabulary or --seq-length, or lack numbers
            that no given model computes.
    """
    objective, batch = objective_of(config), config.training.global_batch_size
    rollouts = read_rollouts(path, needs_log_proposal="log_proposal" in objective.needs)
    for rollout in rollouts:
        _check_tokens(config, rollout, path)
        _check_numbers(config, rollout, path)
        if len(rollout.responses) % objective.group_multiple:
            raise ConfigError(
                f"{path}, {rollout.id}: {len(rollout.responses)} responses; --objective {config.brain.objective} takes "
                f"multiples of {objective.group_multiple}: leave one out, or give another objective"
            )
    if len(rollouts) % batch:
        raise ConfigError(
            f"{path} holds {len(rollouts)} groups, not a multiple of global_batch_size={batch}: give a "
            "--global-batch-size that divides them, or a file of other rounds"
        )
    return rollouts


def _check_numbers(config: RunConfig, rollout: Rollout, path: str) -> None:
    """Raise ConfigError if a number is missing that no given model computes."""
    has_prior = config.scoring.prior_load is not None or config.checkpoint.finetune
    models = {
        "reward": (bool(config.scoring.rewards), "--reward-load (or --reward-function, --reward-url)"),
        "log_prior": (has_prior, "--prior-load"),
    }
    for name, (is_given, flag) in models.items():
        if not is_given and None in rollout.values(name):
            raise ConfigError(f"{path}, {rollout.id}: a response has no {name}: give {flag}, or rollouts that have it")


def _check_tokens(config: RunConfig, rollout: Rollout, path: str) -> None:
    """Raise ConfigError if token ids are outside the vocabulary, or if prompt and response exceed --seq-length."""
    vocab_size, longest = config.model.vocab_size, config.data.seq_length
    for response in rollout.responses:
        tokens = (*rollout.prompt_tokens, *response.tokens)
        wrong = [token for token in tokens if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(
                f"{path}, {rollout.id}: token id {wrong[0]} is outside 0..{vocab_size - 1}: give rollouts of this model"
            )
        if len(tokens) > longest:
            raise ConfigError(
                f"{path}, {rollout.id}: prompt and response have {len(tokens)} tokens, --seq-length is {longest}: "
                "raise it, or leave the group out"
            )
