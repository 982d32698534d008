"""BRAIn: rounds of sampling, scoring and K optimizer steps (arXiv 2402.02479)."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.data.records import Prompt, prompt_groups
from megatron_brain.data.sources import load_records
from megatron_brain.objectives.brain import (
    brain_loss,
    effective_sample_size,
    policy_log_weights,
    posterior_log_weights,
)
from megatron_brain.stages.rollouts import Rollout, read_rollouts, rollout_files, rollout_from_dict
from megatron_brain.stages.rounds import RoundMaker
from megatron_brain.stages.samples import check_unchanged, fixed_settings
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer

log = logging.getLogger(__name__)


class BrainStage:
    """Samples are groups; the loss is the mean over groups of the global batch.

    Group i of a round belongs to replica `(i % global batch) // micro-batch % replicas` from sampling to the last
    step on it, so alpha and beta need no communication.
    """

    head = "policy"
    mean_metrics = (
        "ess_alpha",
        "ess_beta",
        "kl_to_prior",
        "reward_mean",
        "reward_std",
        "reward_under_policy",
        "unfinished_fraction",
    )
    max_metrics = ("max_ratio", "beta_error")

    def __init__(self, run: Run) -> None:
        config = run.config
        self._config, self._parallel = config, run.parallel
        self.shared_prefix = config.training.shared_prefix
        self._files = rollout_files(config.brain.rollout_data) if config.brain.rollout_data else []
        self._prompts = [] if self._files else self._read_prompts(run)
        self._batch = config.training.global_batch_size
        per_round = len(read_rollouts(self._files[0])) if self._files else config.brain.prompts_per_round
        self.steps_per_round = config.brain.refresh_interval or max(1, per_round // self._batch)
        self.train_iters = config.training.train_iters or self._iterations()
        self._maker = RoundMaker(run, self._prompts, self._files)
        self._round = -1
        self._rollouts: list[Rollout] = []
        self._round_metrics: dict[str, float] = {}

    def _read_prompts(self, run: Run) -> Sequence[Prompt]:
        data = run.config.data
        records = load_records(data.train_data, data.train_split, data.max_train_records)
        prompts, report = prompt_groups(records, run.tokenizer, data, room=run.config.sampling.max_new_tokens)
        log.info("%s: %s", data.train_data, report)
        return prompts

    def _iterations(self) -> int:
        if self._files:
            return len(self._files) * self.steps_per_round
        epochs = self._config.training.train_epochs or 1.0
        rounds = math.ceil(epochs * len(self._prompts) / self._config.brain.prompts_per_round)
        return rounds * self.steps_per_round

    def micro_batches(self, trainer: Trainer) -> list[list[Group]]:
        """This replica's groups of the next step, from a new round where the last one is used up."""
        wanted, step = divmod(trainer.iteration, self.steps_per_round)
        if wanted != self._round:
            self._start_round(trainer, wanted)
        mine = self._maker.micro_batches(self._rollouts)
        per_step = self._maker.micro_batches_per_step
        start = step * per_step % len(mine)
        return mine[start : start + per_step]

    def _start_round(self, trainer: Trainer, number: int) -> None:
        self._rollouts, self._round_metrics = self._maker.make(trainer, number)
        self._round = number

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Output: response tokens' log-probabilities `[N]`."""
        settings = self._config.brain
        sizes = [len(group.responses) for group in batch.groups]
        parts = zip(
            batch.sum_per_response(output).split(sizes),
            batch.values("log_proposal").split(sizes),
            batch.values("log_prior").split(sizes),
            batch.values("reward").split(sizes),
            batch.values("finished").split(sizes),
            strict=True,
        )
        losses, means, maxima = [], [], []
        for log_policy, log_proposal, log_prior, reward, finished in parts:
            log_alpha = posterior_log_weights(
                log_prior,
                reward,
                log_proposal,
                reward_temperature=settings.reward_temperature,
                kind=settings.alpha,
            )
            losses.append(
                brain_loss(
                    log_policy,
                    log_proposal,
                    log_alpha,
                    baseline=settings.baseline,
                    strength=settings.policy_strength,
                )
            )
            mean, peak = _health(log_policy.detach(), log_proposal, log_prior, log_alpha, reward, finished)
            means.append(mean)
            maxima.append(peak)
        count = len(losses)
        mean_sums, max_peaks = torch.stack(means).sum(0), torch.stack(maxima).amax(0)
        return LossOutput(
            loss_sum=torch.stack(losses).sum(),
            count=count,
            means={name: (value, count) for name, value in zip(self.mean_metrics, mean_sums, strict=True)},
            maxima=dict(zip(self.max_metrics, max_peaks, strict=True)),
        )

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """None while training: the evaluate stage compares policies on held-out prompts."""
        return {}

    def before_update(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Check the first step of a round, where the policy still is the proposal.

        Raises:
            RuntimeError: beta is not 1/n there: proposal and policy were not computed alike.
        """
        error = metrics["beta_error"]
        if trainer.iteration % self.steps_per_round:
            return
        if self._maker.proposal_is_policy and error > self._config.brain.max_refresh_error:
            raise RuntimeError(
                f"first step of round {self._round}: the policy is the proposal, so every beta is 1/n, but the largest "
                f"difference is {error:.3g} (limit --max-refresh-error {self._config.brain.max_refresh_error:g}). "
                "A mask, template or numerics differs between scoring and training."
            )

    def after_step(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Report the round with its first step."""
        error = metrics.pop("beta_error")
        if (trainer.iteration - 1) % self.steps_per_round:
            return {}
        for tag, text in self._maker.texts(self._rollouts):
            trainer.logger.log_text(trainer.iteration, tag, text)
        return {"beta_error_at_refresh": error, "round": self._round, **self._round_metrics}

    def state_dict(self) -> dict:
        """The round's rollouts of all replicas: a run may stop in the middle of a round."""
        everyone = self._parallel.gather_over_data_parallel(self._rollouts)
        return {
            **self._fixed(),
            "prior": self._maker.prior,
            "round": self._round,
            "rollouts": [r.as_dict() for replica in everyone for r in replica],
        }

    def _fixed(self) -> dict:
        """What the position in the prompts follows from."""
        return {
            **fixed_settings(self._config),
            "num_prompts": len(self._prompts),
            "steps_per_round": self.steps_per_round,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up the round, at any number of replicas."""
        check_unchanged(self._fixed(), state)
        self._maker.keep_prior(state["prior"])
        self._round = state["round"]
        rollouts = [rollout_from_dict(record, "the checkpoint's rollouts") for record in state["rollouts"]]
        self._rollouts = self._maker.share(rollouts)


def _health(
    log_policy: Tensor, log_proposal: Tensor, log_prior: Tensor, log_alpha: Tensor, reward: Tensor, finished: Tensor
) -> tuple[Tensor, Tensor]:
    """The group's mean_metrics and max_metrics, in their order."""
    log_beta = policy_log_weights(log_policy, log_proposal)
    beta = log_beta.exp()
    means = torch.stack(
        [
            effective_sample_size(log_alpha),
            effective_sample_size(log_beta),
            (beta * (log_policy - log_prior)).sum(),
            reward.mean(),
            reward.std(),
            (beta * reward).sum(),
            1.0 - finished.mean(),
        ]
    )
    peaks = torch.stack([(log_policy - log_proposal).max().exp(), (beta - 1.0 / len(beta)).abs().max()])
    return means, peaks


def main(run: Run) -> None:
    """Train."""
    Trainer(run, BrainStage(run)).train()
