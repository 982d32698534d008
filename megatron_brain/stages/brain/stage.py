"""BRAIn: rounds of sampling, scoring and K optimizer steps (arXiv 2402.02479)."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_brain.config.run_length import steps_per_round
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.objectives.brain import (
    brain_loss,
    brain_loss_gradient,
    effective_sample_size,
    policy_log_weights,
)
from megatron_brain.planning.summary import Row
from megatron_brain.stages.brain.placement import Step
from megatron_brain.stages.brain.rollouts import rollout_from_dict
from megatron_brain.stages.brain.rounds import Round, RoundMaker
from megatron_brain.stages.dataset_stage import check_unchanged, fixed_settings
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import as_state, require_same_as_before
from megatron_brain.training.schedule import forward
from megatron_brain.training.trainer import Trainer, train


class BrainStage:
    """Samples are groups; the loss is the mean over groups of the global batch.

    Two ways lead to one gradient. Where a group is whole in its micro-batch, autograd goes through beta. Where it is
    cut into parts, a forward pass of its own yields beta, and the micro-batches then train on the log-probabilities
    weighted by the derivative of the loss in them, which is a constant: for KL(alpha || beta), -(alpha - beta).
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
    max_metrics = ("max_ratio", "beta_error_at_refresh")
    occasional_metrics = (
        "round",
        "seconds_sampling",
        "seconds_scoring",
        "sampled_tokens_per_second",
        "sampler_logprob_difference",
        "proposal_entropy",
    )
    shown_metrics = ("reward_mean", "kl_to_prior", "ess_alpha", "ess_beta", "loss", "tokens_per_second")

    def __init__(self, run: Run) -> None:
        config = run.config
        self._config, self._corpora = config, run.corpora
        self.shared_prefix = config.training.shared_prefix
        self._maker = RoundMaker(run)
        self._proposal = self._maker.proposal
        self.steps_per_round = steps_per_round(config, self._proposal.groups_per_round)
        epochs = config.training.train_epochs or 1.0
        self.train_iters = config.training.train_iters or self._proposal.rounds(epochs) * self.steps_per_round
        self._round: Round | None = None
        self._step: Step = []

    def summary(self) -> list[Row]:
        """The models that score, rounds, and steps."""
        config, proposal = self._config, self._proposal
        rounds = -(-self.train_iters // self.steps_per_round)
        if config.brain.rollout_data is not None:
            each, epochs = f"a file of {config.brain.rollout_data} each", ""
        else:
            responses = 2 if config.brain.responses == "given" else config.sampling.samples_per_prompt
            each = f"{proposal.groups_per_round:,} groups of {responses} responses each"
            passes = rounds * proposal.groups_per_round / proposal.num_prompts
            epochs = f": {passes:.3g} epochs of {proposal.num_prompts:,} prompts"
        return [
            *self._maker.scoring_models(),
            ("rounds", f"{rounds:,} of {self.steps_per_round:,} steps, {each}"),
            ("steps", f"{self.train_iters:,}{epochs}"),
        ]

    def micro_batches(self, trainer: Trainer) -> list[list[Group]]:
        """This replica's groups of the next step, from a new round where the last one is used up."""
        wanted, step = divmod(trainer.iteration, self.steps_per_round)
        if self._round is None or wanted != self._round.number:
            self._round = self._maker.make(trainer, wanted)
        self._step = self._round.steps[step % len(self._round.steps)]
        return [[part.group() for part in micro_batch] for micro_batch in self._step]

    def prepare(self, trainer: Trainer, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Make the first of two passes for micro-batches that hold a cut group's part, or, with --two-pass, for all."""
        batches = list(batches)
        everything = self._config.brain.two_pass
        places = [
            place
            for place, parts in enumerate(self._step)
            if parts and (everything or not all(part.is_whole for part in parts))
        ]
        outputs = forward(trainer.chunks, [batches[place] for place in places], trainer.parallel)
        log_policy: dict[int, Tensor] = {}
        for place, output in zip(places, outputs, strict=True):
            sums = batches[place].sum_per_response(output.cpu())
            parts = self._step[place]
            for part, values in zip(parts, sums.split([len(part.responses) for part in parts]), strict=True):
                whole = log_policy.setdefault(part.rollout.index, torch.full((len(part.rollout.responses),), torch.nan))
                whole[list(part.responses)] = values
        for place in places:
            batches[place] = self._with_known_gradient(batches[place], self._step[place], log_policy)
        return batches

    def _with_known_gradient(self, batch: PackedBatch, parts: Sequence, log_policy: dict[int, Tensor]) -> PackedBatch:
        """The batch with the derivative of the loss in each log-probability, and the loss and health of each group on
        its leading part."""
        groups, gradients = [], []
        for part, group in zip(parts, batch.groups, strict=True):
            values = log_policy[part.rollout.index]
            numbers = {name: torch.tensor(part.rollout.values(name), dtype=torch.float32) for name in _NUMBERS}
            loss, means, peaks = self._group_loss(values, **numbers)
            gradient = brain_loss_gradient(
                values,
                numbers["log_proposal"],
                numbers["log_alpha"],
                baseline=self._config.brain.baseline,
                strength=self._config.brain.policy_strength,
            )[list(part.responses)]
            report = torch.cat([loss[None], means, peaks]).tolist() if part.leads else []
            groups.append(dataclasses.replace(group, values={"gradient": gradient.tolist(), "report": report}))
            gradients.append(gradient)
        per_token = torch.cat(gradients)[batch.response_index]
        return dataclasses.replace(
            batch, groups=tuple(groups), known_gradient=torch.where(batch.loss_mask, per_token, 0.0)
        )

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Output: response tokens' log-probabilities `[N]`."""
        log_policy = batch.sum_per_response(output)
        if batch.known_gradient is None:
            sizes = [len(group.responses) for group in batch.groups]
            numbers = [batch.values(name).split(sizes) for name in _NUMBERS]
            parts = [
                self._group_loss(values, **dict(zip(_NUMBERS, known, strict=True)))
                for values, *known in zip(log_policy.split(sizes), *numbers, strict=True)
            ]
            losses, means, peaks = ([part[i] for part in parts] for i in range(3))
            loss_sum = torch.stack(losses).sum() if losses else output.sum()
        else:
            reports = batch.values("report").view(-1, 1 + len(self.mean_metrics) + len(self.max_metrics))
            losses, means, peaks = reports.split([1, len(self.mean_metrics), len(self.max_metrics)], dim=1)
            # The value is the loss's, the gradient the constant-weight form's.
            moving = (batch.values("gradient") * (log_policy - log_policy.detach())).sum()
            loss_sum = losses.sum() + moving
        return self._report(loss_sum, means, peaks)

    def _group_loss(
        self, log_policy: Tensor, *, log_proposal: Tensor, log_alpha: Tensor, **others: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of one group from numbers `[n]`, its mean_metrics and max_metrics."""
        settings = self._config.brain
        loss = brain_loss(
            log_policy, log_proposal, log_alpha, baseline=settings.baseline, strength=settings.policy_strength
        )
        return loss, *_health(log_policy.detach(), log_proposal=log_proposal, log_alpha=log_alpha, **others)

    def _report(
        self, loss_sum: Tensor, means: Sequence[Tensor] | Tensor, peaks: Sequence[Tensor] | Tensor
    ) -> LossOutput:
        """Report of a micro-batch with as many counted groups as `means` has rows, which may be none."""
        count = len(means)
        none = torch.zeros(len(self.mean_metrics)), torch.full((len(self.max_metrics),), -torch.inf)
        mean_sums = sum(means) if count else none[0]
        max_peaks = torch.stack(tuple(peaks)).amax(0) if count else none[1]
        return LossOutput(
            loss_sum=loss_sum,
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
        error = metrics["beta_error_at_refresh"]
        number, step = divmod(trainer.iteration, self.steps_per_round)
        limit = self._config.brain.max_refresh_error
        if step == 0 and self._maker.proposal_is_policy(number) and not error <= limit:
            raise RuntimeError(
                f"first step of round {number}: the policy is the proposal, so every beta is 1/n, but the largest "
                f"difference is {error:.3g} (limit --max-refresh-error {limit:g}). "
                "A mask, template or numerics differs between scoring and training."
            )

    def after_step(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Report the round with its first step."""
        if (trainer.iteration - 1) % self.steps_per_round:
            del metrics["beta_error_at_refresh"]
            return {}
        for tag, text in self._round.texts():
            trainer.logger.log_text(trainer.iteration, tag, text)
        return {"round": self._round.number, **self._round.metrics}

    def state_dict(self) -> dict:
        """Which round it is, and of which prior."""
        return {
            **self._fixed(),
            "prior": self._maker.prior.path,
            "round": self._round.number if self._round else -1,
            "data": as_state(self._corpora),
        }

    def records(self) -> list[dict]:
        """The round's rollouts on this replica: a run may stop in the middle of a round."""
        return [rollout.as_dict() for rollout in self._round.rollouts] if self._round else []

    def _fixed(self) -> dict:
        """What the position in the prompts follows from."""
        return {
            **fixed_settings(self._config),
            "num_prompts": self._proposal.num_prompts,
            "steps_per_round": self.steps_per_round,
        }

    def load_state_dict(self, state: dict, records: Sequence[dict]) -> None:
        """Take up the round, at any number of replicas."""
        check_unchanged(self._fixed(), state)
        require_same_as_before(self._corpora, state.get("data"))
        if state["prior"] is not None and self._config.scoring.prior_load is None:
            self._maker.prior.point_to(state["prior"])
        rollouts = [rollout_from_dict(record, "the checkpoint's rollouts") for record in records]
        self._round = self._maker.take_up(state["round"], rollouts) if rollouts else None


_NUMBERS = ("log_proposal", "log_prior", "reward", "log_alpha", "finished")
"""What the objective and its health need to know of each response besides log q_theta."""


def _health(
    log_policy: Tensor, *, log_proposal: Tensor, log_prior: Tensor, log_alpha: Tensor, reward: Tensor, finished: Tensor
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
    train(run, BrainStage)
