"""The brain stage: rounds of sampling, scoring and K optimizer steps (arXiv 2402.02479), with any objective."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_brain.config.run import RunConfig
from megatron_brain.config.run_length import length_of_rounds
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.errors import ConfigError
from megatron_brain.planning.summary import Row
from megatron_brain.stages.brain.group_loss import GroupLoss, as_known, of_known
from megatron_brain.stages.brain.held_out import HeldOut, held_out_metrics
from megatron_brain.stages.brain.logprob_comparison import DIFFERENCES, WEIGHTS
from megatron_brain.stages.brain.objectives import objective_of
from megatron_brain.stages.brain.placement import Part, Step
from megatron_brain.stages.brain.rollouts import Rollout, rollout_from_dict
from megatron_brain.stages.brain.rounds import Round, RoundMaker
from megatron_brain.stages.dataset_stage import check_unchanged, fixed_settings
from megatron_brain.stages.rewards.rewards import reward_metric_names
from megatron_brain.training.best import Direction
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run
from megatron_brain.training.same_data import as_state, require_same_as_before
from megatron_brain.training.schedule import forward
from megatron_brain.training.trainer import Trainer

_AHEAD = "ahead"
"""Key of a checkpoint's record that holds a rollout of the round drawn ahead."""


class BrainStage:
    """Samples are groups; the loss is the mean over groups of the global batch.

    There are two ways to the same gradient. If a group is whole in its micro-batch, autograd differentiates its loss.
    If it is cut into parts, an extra forward pass computes the log-probabilities of the whole group. The micro-batches
    then train on the log-probabilities, each weighted by the derivative of the loss in it. These derivatives are
    constants: -(alpha - beta) for KL(alpha || beta).
    """

    occasional_metrics = (
        "round",
        "seconds_sampling",
        "seconds_scoring",
        "sampled_tokens_per_second",
        "proposal_entropy",
    )
    shown_metrics = (
        "reward_mean",
        "kl_to_prior",
        "ess_alpha",
        "ess_beta",
        "pair_accuracy",
        "clipped_fraction",
        "win_rate_reward",
        "win_rate_judge",
        "posterior_kl_alpha_beta",
        "loss",
        "tokens_per_second",
    )
    """The console shows those of these that the objective and the validations have."""

    @classmethod
    def metric_names(cls, config: RunConfig) -> tuple[str, ...]:
        """Names of the metrics that the stage logs with the run's objective."""
        objective = objective_of(config)
        loss = GroupLoss(objective)
        of_proposal = ["distinct_candidates"] if config.brain.responses == "rso" else []
        if config.engine.engine != "native":
            of_proposal += ["seconds_weight_sync", "seconds_waiting_for_samples"]
        of_logprobs = (*DIFFERENCES, *(WEIGHTS if objective.fixes == "alpha" else ()))
        of_round = (*cls.occasional_metrics, *of_proposal, *of_logprobs, *reward_metric_names(config))
        names = (*loss.mean_metrics, *loss.max_metrics, *of_round, *held_out_metrics(config))
        return tuple(dict.fromkeys(names))

    @classmethod
    def best_metrics(cls, config: RunConfig) -> Mapping[str, Direction]:
        """The metrics of validations by which one checkpoint is better than another."""
        return {name: direction for name, direction in held_out_metrics(config).items() if direction is not None}

    def __init__(self, run: Run) -> None:
        config = run.config
        self._config, self._corpora = config, run.corpora
        self.shared_prefix = config.training.shared_prefix
        objective = objective_of(config)
        self._group_loss, self._refresh_check = GroupLoss(objective), objective.refresh_check
        self.mean_metrics, self.max_metrics = self._group_loss.mean_metrics, self._group_loss.max_metrics
        self._maker = RoundMaker(run, objective)
        self._proposal = self._maker.proposal
        rounds = self._proposal.rounds(config.training.train_epochs or 1.0)
        length = length_of_rounds(config, rounds, self._proposal.groups_per_round)
        self.train_iters, self.steps_per_round = length.train_iters, length.steps_per_round
        self._round: Round | None = None
        self._step: Step = []
        self._held_out: HeldOut | None = None
        if config.data.valid_data is not None:
            maker = self._maker
            self._held_out = HeldOut(run, maker.held_out, maker.engine, maker.prior, maker.rewards)

    def summary(self) -> list[Row]:
        """Rows for the models that score, the rounds, and the steps."""
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
            *self._maker.scoring_rows(),
            ("rounds", f"{rounds:,} of {self.steps_per_round:,} steps, {each}"),
            ("steps", f"{self.train_iters:,}{epochs}"),
        ]

    def micro_batches(self, trainer: Trainer) -> list[list[Group]]:
        """This replica's groups of the next step. If the last round is used up, a new one is made."""
        wanted, step = divmod(trainer.iteration, self.steps_per_round)
        if self._round is None or wanted != self._round.number:
            is_last = (wanted + 1) * self.steps_per_round >= self.train_iters
            self._round = self._maker.make(trainer, wanted, is_last=is_last)
        self._step = self._round.steps[step % len(self._round.steps)]
        return [[part.group() for part in micro_batch] for micro_batch in self._step]

    def prepare(self, trainer: Trainer, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Make the first of two passes for micro-batches with parts of cut groups; with --two-pass, for all."""
        batches = list(batches)
        everything = self._config.brain.two_pass
        places = [
            place
            for place, parts in enumerate(self._step)
            if parts and (everything or not all(part.is_whole for part in parts))
        ]
        outputs = forward(trainer.gathered_chunks(), [batches[place] for place in places], trainer.parallel)
        log_policy: dict[int, Tensor] = {}
        for place, output in zip(places, outputs, strict=True):
            sums = batches[place].sum_per_response(output.cpu())
            parts = self._step[place]
            for part, values in zip(parts, sums.split([len(part.responses) for part in parts]), strict=True):
                whole = log_policy.setdefault(part.rollout.index, torch.full((len(part.rollout.responses),), torch.nan))
                whole[list(part.responses)] = values
        for place in places:
            batches[place] = self._with_known_loss(batches[place], self._step[place], log_policy)
        return batches

    def _with_known_loss(self, batch: PackedBatch, parts: Sequence[Part], log_policy: dict[int, Tensor]) -> PackedBatch:
        """The batch with the derivative of the loss in each log-probability, and with the loss and the metrics of those
        groups whose leading part it holds."""
        leading, gradients = [], []
        for part in parts:
            group = log_policy[part.rollout.index], part.rollout.numbers(self._group_loss.names)
            gradients.append(self._group_loss.objective.gradient(*group)[list(part.responses)])
            if part.leads:
                leading.append(group)
        per_token = torch.cat(gradients)[batch.response_index]
        return dataclasses.replace(
            batch,
            known_gradient=torch.where(batch.loss_mask, per_token, 0.0),
            known_loss=as_known(self._group_loss.of_groups(leading)),
        )

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Loss from `output`, the log-probabilities `[N]` of the response tokens."""
        if batch.known_loss is not None:
            return of_known(output, batch)
        return self._group_loss.of_batch(output, batch)

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """Metrics of the answers to the held-out prompts; empty if the run has none."""
        if self._held_out is None:
            return {}
        # The engine cannot take other weights before it has drawn what was asked of it.
        self._maker.finish_ahead(trainer)
        return self._held_out.evaluate(trainer)

    def end_reason(self) -> str | None:
        """Why the run ends, if the policy is too far from the prior."""
        return None if self._held_out is None else self._held_out.end_reason()

    def before_update(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Check the first step of a round, in which the policy is still the proposal.

        Raises:
            RuntimeError: the objective's claim about this step does not hold, so proposal and policy were computed in
                different ways.
        """
        check, limit = self._refresh_check, self._config.brain.max_refresh_error
        number, step = divmod(trainer.iteration, self.steps_per_round)
        if check is None or step or not self._maker.proposal_is_policy(number):
            return
        error = metrics[check.metric]
        if not error <= limit:
            raise RuntimeError(
                f"first step of round {number}: the policy is the proposal, so {check.claim}, but the largest "
                f"difference is {error:.3g} (limit --max-refresh-error {limit:g}). "
                "A mask, template or numerics differs between scoring and training."
            )

    def after_step(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Log the round with its first step."""
        if (trainer.iteration - 1) % self.steps_per_round:
            if self._refresh_check is not None:
                del metrics[self._refresh_check.metric]
            return {}
        for tag, text in self._round.texts():
            trainer.logger.log_text(trainer.iteration, tag, text)
        return {"round": self._round.number, **self._round.metrics}

    def state_dict(self) -> dict:
        """The number of the round, its objective and its prior."""
        return {
            **self._fixed(),
            "objective": self._config.brain.objective,
            "prior": self._maker.prior.path,
            "round": self._round.number if self._round else -1,
            "rounds_ahead": self._config.brain.rounds_ahead,
            "reward_scale": self._maker.reward_scale.state_dict(),
            "data": as_state(self._corpora),
            "held_out": None if self._held_out is None else self._held_out.state_dict(),
        }

    def records(self, trainer: Trainer) -> list[dict]:
        """Rollouts on this replica: those of the round, in whose middle a run may stop, and those drawn ahead. Only
        weights that are gone by then could draw these again, so the save waits for them. And the replica's share of the
        prior's answers to the held-out prompts."""
        ahead = [{_AHEAD: rollout.as_dict()} for rollout in self._maker.finish_ahead(trainer)]
        of_rounds = [*(rollout.as_dict() for rollout in self._round.rollouts), *ahead] if self._round else []
        return of_rounds if self._held_out is None else [*of_rounds, *self._held_out.records()]

    def _fixed(self) -> dict:
        """Everything that determines the position in the prompts."""
        return {
            **fixed_settings(self._config),
            "num_prompts": self._proposal.num_prompts,
            "steps_per_round": self.steps_per_round,
        }

    def load_state_dict(self, state: dict, records: Sequence[dict]) -> None:
        """Continue the round. The number of replicas may have changed."""
        check_unchanged(self._fixed(), state)
        require_same_as_before(self._corpora, state.get("data"))
        before, now = state.get("objective", "brain"), self._config.brain.objective
        if before != now:
            raise ConfigError(
                f"the run cannot be resumed with --objective {now}: its round was made for {before}. Resume with "
                f"--objective {before}, or start anew from the weights with --finetune"
            )
        if state["prior"] is not None and self._config.scoring.prior_load is None:
            self._maker.prior.point_to(state["prior"])
        ahead = state.get("rounds_ahead", 0)
        if ahead != self._config.brain.rounds_ahead:
            raise ConfigError(
                f"the run cannot be resumed with --rounds-ahead {self._config.brain.rounds_ahead}: its rounds were "
                f"drawn with {ahead}. Resume with --rounds-ahead {ahead}, or start anew from the weights with "
                "--finetune"
            )
        self._maker.reward_scale.load_state_dict(state.get("reward_scale", {}))
        if self._held_out is not None:
            of_prior = [record for record in records if "held_out" in record]
            self._held_out.load_state_dict(state.get("held_out"), of_prior)
        # The rollouts were scored before, so they have all numbers that the objective needs.
        self._round = None
        found: dict[bool, list[Rollout]] = {False: [], True: []}
        for record in records:
            if "held_out" in record:
                continue
            rollout = rollout_from_dict(
                record.get(_AHEAD, record), "the checkpoint's rollouts", needs_log_proposal=False
            )
            found[_AHEAD in record].append(rollout)
        if found[False]:
            self._round = self._maker.take_up(state["round"], found[False])
        if found[True]:
            self._maker.take_up_ahead(state["round"] + 1, found[True])
