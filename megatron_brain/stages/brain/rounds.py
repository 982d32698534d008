"""Makes the rounds of a brain run: responses, their place in the steps, and their numbers."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import TRAIN_DATA
from megatron_brain.data.records import Prompt
from megatron_brain.errors import RecordError, UserError
from megatron_brain.models.provider import Chunk
from megatron_brain.objectives.objective import Objective
from megatron_brain.planning.summary import Row
from megatron_brain.stages.brain.ahead import DrawnAhead
from megatron_brain.stages.brain.logprob_comparison import compare_logprobs
from megatron_brain.stages.brain.placement import Placement, Step, rollouts_in
from megatron_brain.stages.brain.proposals import GivenPairs, Proposal, RolloutFiles, SampledResponses
from megatron_brain.stages.brain.rejection_sampling import RejectionSamples
from megatron_brain.stages.brain.rollouts import Rollout, write_rollouts
from megatron_brain.stages.brain.scoring import score_responses, score_tokens
from megatron_brain.stages.brain.spec import HELD_OUT
from megatron_brain.stages.engine import open_engine
from megatron_brain.stages.rewards.rewards import Rewards
from megatron_brain.stages.rewards.scale import Scale
from megatron_brain.training.frozen import FrozenModel
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer

_TEXTS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Round:
    """This replica's part of a round: its rollouts, and its micro-batches of every step over them."""

    number: int
    steps: list[Step]
    rollouts: list[Rollout]
    metrics: dict[str, float] = field(default_factory=dict)

    def texts(self) -> list[tuple[str, str]]:
        """A few prompts with their best and worst response, as (tag, Markdown)."""
        shown = []
        for place, rollout in enumerate(self.rollouts[:_TEXTS_SHOWN]):
            ranked = sorted(rollout.responses, key=lambda response: response.reward)
            lines = [f"    {rollout.prompt}", ""]
            for response in (ranked[-1], ranked[0]):
                fixed = ", ".join(f"{name} {value:.3f}" for name, value in response.fixed.items())
                parts = ", ".join(f"{name} {value:.3f}" for name, value in response.reward_parts.items())
                shown_parts = f" ({parts})" if len(response.reward_parts) > 1 else ""
                lines.append(f"* reward {response.reward:.3f}{shown_parts}, {fixed}: `{response.text}`")
            shown.append((f"samples/{place}", "\n".join(lines)))
        return shown


class RoundMaker:
    """Makes one round after another. Each replica makes its own part."""

    def __init__(self, run: Run, objective: Objective) -> None:
        self._run, self._settings, self._objective = run, run.config.brain, objective
        scoring = run.config.scoring
        self.prior = FrozenModel(run, "prior", _prior_folder(run.config), head="policy", offload=scoring.offload_prior)
        self.rewards, self.reward_scale = Rewards(run), Scale()
        self._placement = Placement.of(run.config, run.parallel)
        draws = self._settings.responses != "given" and self._settings.rollout_data is None
        self._prompts: Sequence[Prompt] = run.read(TRAIN_DATA) if draws else ()
        self.held_out: Sequence[Prompt] = run.read(HELD_OUT)
        """The prompts of --valid-data."""
        self.engine = open_engine(run, self._prompts, self.held_out)
        self._ahead: DrawnAhead | None = None
        self.proposal = self._open_proposal()

    def _open_proposal(self) -> Proposal:
        """The proposal that the settings ask for. Its data are read here."""
        run, placement = self._run, self._placement
        if self._settings.rollout_data:
            return RolloutFiles(run, placement)
        if self._settings.responses == "given":
            return GivenPairs(run, placement)
        if self._settings.responses == "rso":
            samples = SampledResponses(run, placement, self.prior, self.engine, self._prompts)
            return RejectionSamples(run, placement, samples, self.rewards, self.reward_scale)
        if self._settings.rounds_ahead:
            self._ahead = DrawnAhead(run, placement, self.prior, self.engine, self._prompts)
            return self._ahead
        return SampledResponses(run, placement, self.prior, self.engine, self._prompts)

    def scoring_rows(self) -> list[Row]:
        """Where the prior and the reward come from, as rows of the banner."""
        prior = [] if self.prior.path is None else [("prior", self.prior.path)]
        return [*prior, *self.rewards.rows()]

    def make(self, trainer: Trainer, number: int, *, is_last: bool) -> Round:
        """Make a round. Its metrics are the same on all ranks.

        Args:
            trainer: the trainer, whose policy is that of the start of the round.
            number: of the round, from 0.
            is_last: whether no round comes after it.

        Raises:
            RuntimeError: the log-probabilities of the sampler and of the trainer differ.
            Interrupted: the process was asked to stop while the responses were drawn.
        """
        start = time.perf_counter()
        drawn = self.proposal.rollouts(trainer, number)
        if self._ahead is not None and not is_last:
            self._ahead.begin(trainer, number + 1)
        sampled = time.perf_counter()
        steps = self._placement.steps(drawn)
        rollouts = rollouts_in(steps)
        self._score(trainer, steps, rollouts, number)
        if self._ahead is not None and not is_last:
            self._ahead.keep_weights(trainer)
        self._fix(rollouts)
        scored = time.perf_counter()
        self._write(rollouts, number)
        metrics = {"seconds_sampling": sampled - start, "seconds_scoring": scored - sampled, **self.proposal.metrics}
        metrics |= self._metrics(rollouts, metrics["seconds_sampling"]) | self.rewards.metrics(rollouts)
        return Round(number=number, steps=steps, rollouts=rollouts, metrics=metrics)

    def finish_ahead(self, trainer: Trainer) -> list[Rollout]:
        """Wait for the round that is drawn ahead. All ranks call it together.

        Returns:
            its rollouts on this replica, with log q'; none if no round is drawn ahead.
        """
        found = None if self._ahead is None else self._ahead.finish()
        if found is None:
            return []
        number, rollouts = found
        steps = self._placement.steps(rollouts)
        rollouts = rollouts_in(steps)
        self._score_proposal(trainer, steps, rollouts, number)
        self._ahead.take_up(number, rollouts)
        return rollouts

    def take_up(self, number: int, rollouts: Sequence[Rollout]) -> Round:
        """A round of an earlier run, from the scored rollouts of all its replicas, however many there are now."""
        steps = self._placement.steps(self._share(rollouts))
        mine = rollouts_in(steps)
        self._fix(mine)
        return Round(number=number, steps=steps, rollouts=mine)

    def take_up_ahead(self, number: int, rollouts: Sequence[Rollout]) -> None:
        """The round that an earlier run has drawn ahead, from the rollouts of all its replicas."""
        self._ahead.take_up(number, self._share(rollouts))

    def _share(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return self._placement.deal(sorted(rollouts, key=lambda rollout: rollout.index))

    def proposal_is_policy(self, number: int) -> bool:
        """Whether log q' of a round is the trainer's log-probability under the policy at the start of the round."""
        if self.proposal.temperature != 1.0 or self._settings.proposal_logprobs == "engine":
            return False
        if self._ahead is not None:
            return number == 0
        return not self.proposal.from_prior or self._policy_is_prior(number)

    def _policy_is_prior(self, number: int) -> bool:
        """Whether the policy at the start of the round is still the prior's checkpoint."""
        return number == 0 and not self._run.resuming and self._run.config.scoring.prior_load is None

    def _score(self, trainer: Trainer, steps: list[Step], rollouts: list[Rollout], number: int) -> None:
        """Fill in the missing numbers that the objective needs."""
        self._score_proposal(trainer, steps, rollouts, number)
        if "log_prior" in self._objective.needs and self._is_missing("log_prior", rollouts):
            with self.prior.loaded() as chunks:
                for response, value in score_responses(self._run, steps, chunks, head="policy"):
                    response.log_prior = value
        if self._is_missing("reward", rollouts):
            self.rewards.score(steps, self.reward_scale)

    def _score_proposal(self, trainer: Trainer, steps: list[Step], rollouts: list[Rollout], number: int) -> None:
        """Compute log q' with the trainer's code, choose the log q' that makes the weights, and take it as log p where
        the proposal is the prior."""
        needs, temperature = self._objective.needs, self.proposal.temperature
        is_prior = self.proposal.from_prior or self._policy_is_prior(number)
        gives_prior = is_prior and temperature == 1.0 and "log_prior" in needs
        if temperature is None or not ("log_proposal" in needs or gives_prior):
            for response in (response for rollout in rollouts for response in rollout.responses):
                response.sampler_token_logprobs = None  # Nothing will be compared with them.
            return
        if self._is_missing("trainer_logprob", rollouts):
            # The code that trains computes log q', in its micro-batches. So beta is exactly 1/n before the first step.
            with self._weights_that_drew(trainer, number) as chunks:
                for response, value, of_tokens in score_tokens(self._run, steps, chunks, temperature=temperature):
                    response.trainer_logprob = value
                    response.compare_tokens(of_tokens.tolist())
        of_engine = self._settings.proposal_logprobs == "engine"
        for response in (response for rollout in rollouts for response in rollout.responses):
            response.log_proposal = response.sampler_logprob if of_engine else response.trainer_logprob
            if gives_prior:
                response.log_prior = response.trainer_logprob

    @contextlib.contextmanager
    def _weights_that_drew(self, trainer: Trainer, number: int) -> Iterator[Sequence[Chunk]]:
        if self._ahead is not None:
            model = self._ahead.weights_that_drew(trainer)
        elif self.proposal.from_prior and not self._policy_is_prior(number):
            model = self.prior.loaded()
        else:
            model = contextlib.nullcontext(trainer.gathered_chunks())
        with model as chunks:
            yield chunks

    def _is_missing(self, name: str, rollouts: Sequence[Rollout]) -> bool:
        """Whether the number is missing on any replica. All ranks must then score together."""
        mine = any(value is None for rollout in rollouts for value in rollout.values(name))
        return any(self._run.parallel.gather_over_data_parallel(mine))

    def _metrics(self, rollouts: Sequence[Rollout], seconds: float) -> dict[str, float]:
        """Metrics of the responses and their log q', the same on all ranks."""
        tokens = self._total(sum(len(response.tokens) for rollout in rollouts for response in rollout.responses))
        metrics = {"sampled_tokens_per_second": tokens / seconds}
        if self._settings.responses != "sampled":
            return metrics
        if not self._is_missing("log_proposal", rollouts):
            # For tokens drawn from q', the mean of -log q' estimates the entropy of q'.
            metrics["proposal_entropy"] = -self._total(sum(sum(r.values("log_proposal")) for r in rollouts)) / tokens
        if not any([self._is_missing(name, rollouts) for name in ("trainer_logprob", "sampler_logprob")]):
            metrics |= compare_logprobs(
                rollouts,
                self._objective,
                self._run.parallel,
                strength=self._settings.policy_strength,
                limit=self._settings.max_sampler_difference,
            )
        return metrics

    def _total(self, value: float) -> float:
        return self._run.parallel.sum_over_data_parallel(
            torch.tensor(value, dtype=torch.float64, device=self._run.parallel.device)
        ).item()

    def _fix(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            try:
                fixed = self._objective.fix(rollout.numbers(self._objective.needs))
            except UserError as error:
                raise RecordError(rollout.id, "no weights", str(error)) from error
            for response, value in zip(rollout.responses, fixed.tolist(), strict=True):
                response.fixed = {self._objective.fixes: value}

    def _write(self, rollouts: Sequence[Rollout], number: int) -> None:
        directory = self._settings.rollout_dir
        if directory is None:
            return
        everyone = self._run.parallel.gather_over_data_parallel(list(rollouts))
        if self._run.parallel.is_writer:
            ordered = sorted((r for replica in everyone for r in replica), key=lambda rollout: rollout.index)
            write_rollouts(Path(directory) / f"round_{number:04d}.jsonl", ordered)


def _prior_folder(config: RunConfig) -> str | None:
    """--prior-load, or else the checkpoint that a --finetune run starts from. A resumed policy is not the prior."""
    return config.scoring.prior_load or (config.checkpoint.load if config.checkpoint.finetune else None)
