"""Makes the rounds of a brain run: responses, their place in the steps, and their numbers."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_brain.config.run import RunConfig
from megatron_brain.errors import RecordError, UserError
from megatron_brain.objectives.objective import Objective
from megatron_brain.planning.summary import Row
from megatron_brain.stages.brain.placement import Placement, Step, rollouts_in
from megatron_brain.stages.brain.proposals import GivenPairs, Proposal, RolloutFiles, SampledResponses
from megatron_brain.stages.brain.rejection_sampling import RejectionSamples
from megatron_brain.stages.brain.rollouts import Rollout, write_rollouts
from megatron_brain.stages.brain.scoring import score_responses
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
        self._placement = Placement(
            run.config.training,
            run.parallel,
            interleaved=run.config.parallel.num_layers_per_virtual_pipeline_stage is not None,
            round_to=run.config.fp8.packed_multiple(run.config.parallel),
        )
        self.proposal = self._open_proposal()

    def _open_proposal(self) -> Proposal:
        """The proposal that the settings ask for. Its data are read here."""
        run, placement = self._run, self._placement
        if self._settings.rollout_data:
            return RolloutFiles(run, placement)
        if self._settings.responses == "given":
            return GivenPairs(run, placement)
        if self._settings.responses == "rso":
            return RejectionSamples(run, placement, self.prior, self.rewards, self.reward_scale)
        return SampledResponses(run, placement, self.prior)

    def scoring_rows(self) -> list[Row]:
        """Where the prior and the reward come from, as rows of the banner."""
        prior = [] if self.prior.path is None else [("prior", self.prior.path)]
        return [*prior, *self.rewards.rows()]

    def make(self, trainer: Trainer, number: int) -> Round:
        """Make a round. Its metrics are the same on all ranks.

        Raises:
            RuntimeError: the log-probabilities of the sampler and of the trainer differ.
        """
        start = time.perf_counter()
        drawn = self.proposal.rollouts(trainer, number)
        sampled = time.perf_counter()
        steps = self._placement.steps(drawn)
        rollouts = rollouts_in(steps)
        rescored = self._score(trainer, steps, rollouts, number)
        self._fix(rollouts)
        scored = time.perf_counter()
        self._write(rollouts, number)
        tokens = self._total(sum(len(response.tokens) for rollout in rollouts for response in rollout.responses))
        metrics = {
            "seconds_sampling": sampled - start,
            "seconds_scoring": scored - sampled,
            "sampled_tokens_per_second": tokens / (sampled - start),
            **self.proposal.metrics,
            **self.rewards.metrics(rollouts),
        }
        if self._settings.responses == "sampled" and not self._is_missing("log_proposal", rollouts):
            metrics["proposal_entropy"] = self._entropy(rollouts, tokens)
        if self._settings.responses == "sampled" and rescored:
            metrics["sampler_logprob_difference"] = self._sampler_difference(rollouts, tokens)
        return Round(number=number, steps=steps, rollouts=rollouts, metrics=metrics)

    def take_up(self, number: int, rollouts: Sequence[Rollout]) -> Round:
        """A round of an earlier run, from the scored rollouts of all its replicas, however many there are now."""
        ordered = sorted(rollouts, key=lambda rollout: rollout.index)
        steps = self._placement.steps(self._placement.deal(ordered))
        mine = rollouts_in(steps)
        self._fix(mine)
        return Round(number=number, steps=steps, rollouts=mine)

    def proposal_is_policy(self, number: int) -> bool:
        """Whether log q' of a round is the log-probability under the policy at the start of the round."""
        return self.proposal.temperature == 1.0 and (not self.proposal.from_prior or self._policy_is_prior(number))

    def _policy_is_prior(self, number: int) -> bool:
        """Whether the policy at the start of the round is still the prior's checkpoint."""
        return number == 0 and not self._run.resuming and self._run.config.scoring.prior_load is None

    def _score(self, trainer: Trainer, steps: list[Step], rollouts: list[Rollout], number: int) -> bool:
        """Fill in the missing numbers that the objective needs. Returns whether log q' was computed."""
        needs, temperature = self._objective.needs, self.proposal.temperature
        is_prior = self.proposal.from_prior or self._policy_is_prior(number)
        gives_prior = is_prior and temperature == 1.0 and "log_prior" in needs
        rescores = temperature is not None and ("log_proposal" in needs or gives_prior)
        if rescores:
            # The code that trains computes log q', in its micro-batches. So beta is exactly 1/n before the first step.
            loads_prior = is_prior and not self._policy_is_prior(number)
            with self.prior.loaded() if loads_prior else contextlib.nullcontext(trainer.gathered_chunks()) as chunks:
                for response, value in score_responses(
                    self._run, steps, chunks, head="policy", temperature=temperature
                ):
                    response.log_proposal = value
            if gives_prior:
                for response in (response for rollout in rollouts for response in rollout.responses):
                    response.log_prior = response.log_proposal
        if "log_prior" in needs and self._is_missing("log_prior", rollouts):
            with self.prior.loaded() as chunks:
                for response, value in score_responses(self._run, steps, chunks, head="policy"):
                    response.log_prior = value
        if self._is_missing("reward", rollouts):
            self.rewards.score(steps, self.reward_scale)
        return rescores

    def _is_missing(self, name: str, rollouts: Sequence[Rollout]) -> bool:
        """Whether the number is missing on any replica. All ranks must then score together."""
        mine = any(value is None for rollout in rollouts for value in rollout.values(name))
        return any(self._run.parallel.gather_over_data_parallel(mine))

    def _entropy(self, rollouts: Sequence[Rollout], tokens: float) -> float:
        """Mean of -log q' over all tokens, in nats. For tokens drawn from q' it estimates the entropy of q'."""
        return -self._total(sum(sum(rollout.values("log_proposal")) for rollout in rollouts)) / tokens

    def _sampler_difference(self, rollouts: Sequence[Rollout], tokens: float) -> float:
        """Mean |log q' of the trainer - that of the sampler| over all replicas, in nats per token, below the limit."""
        differences = (
            abs(response.log_proposal - response.sampler_logprob)
            for rollout in rollouts
            for response in rollout.responses
        )
        difference = self._total(sum(differences)) / tokens
        if not difference <= self._settings.max_sampler_difference:
            raise RuntimeError(
                f"log q' of the trainer and of the sampler differ by {difference:.3g} nats per token on average (limit "
                f"--max-sampler-difference {self._settings.max_sampler_difference:g}): the key/value cache, positions "
                "or temperature of sampling are not those of training"
            )
        return difference

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
