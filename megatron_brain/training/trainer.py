"""The one training loop of all stages."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from megatron_brain.checkpointing import (
    TrainingState,
    load_training_state,
    load_weights,
    read_records,
)
from megatron_brain.config.run import RunConfig
from megatron_brain.config.run_length import check_warmup
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.generation.engine import Interrupted
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.provider import Chunk
from megatron_brain.planning.summary import Row
from megatron_brain.runtime import signals
from megatron_brain.training.banner import show_banner
from megatron_brain.training.best import BestCheckpoint, Direction
from megatron_brain.training.guards import StepGuard
from megatron_brain.training.optimizer import (
    build_optimizer,
    clip_and_step,
    finish_param_gather,
    overlap,
    wrap_for_training,
)
from megatron_brain.training.progress import shown_metrics
from megatron_brain.training.replicas import check_replicas
from megatron_brain.training.report import LossOutput, count_tokens, reduce_reports
from megatron_brain.training.run import Run
from megatron_brain.training.saving import goes_on_in_place, open_saver
from megatron_brain.training.schedule import forward_backward, pack_micro_batches

log = logging.getLogger(__name__)

_STEP_METRICS = (
    "loss",
    "grad_norm",
    "lr",
    "skipped_steps",
    "padding_fraction",
    "response_length",
    "seconds_per_step",
    "tokens_per_second",
)
"""Names of the metrics that every stage has for a step."""


class Stage(Protocol):
    """What a stage adds to the loop: its batches, its loss and its metrics."""

    mean_metrics: tuple[str, ...]
    """Names of the means that its loss reports besides the loss itself."""
    max_metrics: tuple[str, ...]
    """Names of the maxima that its loss reports."""
    shown_metrics: tuple[str, ...]
    """Names of the few metrics of steps and validations that the console shows, in their order."""
    shared_prefix: bool
    train_iters: int

    @classmethod
    def metric_names(cls, config: RunConfig) -> tuple[str, ...]:
        """Names of all metrics that the stage logs, including those that only some steps or validations have."""

    @classmethod
    def best_metrics(cls, config: RunConfig) -> Mapping[str, Direction]:
        """The metrics of validations by which one checkpoint is better than another, for --keep-best."""

    def summary(self) -> Sequence[Row]:
        """Rows of the banner: the length of the run, and the models and samples of this stage."""

    def micro_batches(self, trainer: "Trainer") -> Sequence[Sequence[Group]]:
        """This replica's micro-batches of the next step. `trainer.iteration` steps are done."""

    def prepare(self, trainer: "Trainer", batches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """The step's packed micro-batches, with everything that the loss must know before the first backward pass."""

    def loss(self, output: torch.Tensor, batch: PackedBatch) -> LossOutput:
        """Loss of a micro-batch from the head's output on the last pipeline stage."""

    def validate(self, trainer: "Trainer") -> dict[str, float]:
        """Metrics on held-out data; empty if the run has none.

        Raises:
            Interrupted: on all ranks: the process was asked to stop while responses were drawn.
        """

    def end_reason(self) -> str | None:
        """Why the run ends after the last validation, in words; None: it goes on. It is the same on all ranks."""

    def before_update(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """Check the metrics of the step's loss before the weights change. It may raise to stop the run."""

    def after_step(self, trainer: "Trainer", metrics: dict[str, float]) -> dict[str, float]:
        """Take the metrics of the finished step. Returns further metrics of the stage to log."""

    def state_dict(self) -> dict:
        """JSON-able state that resuming needs besides the iteration. It is the same on all ranks."""

    def records(self, trainer: "Trainer") -> Sequence[dict]:
        """JSON-able records of this replica that resuming needs."""

    def load_state_dict(self, state: dict, records: Sequence[dict]) -> None:
        """Continue from the state of an earlier run and the records of all its replicas."""


def metric_names(config: RunConfig, stage: Stage | type[Stage]) -> tuple[str, ...]:
    """Names of all metrics of a stage. `validation/` is left out."""
    return (*_STEP_METRICS, *stage.metric_names(config))


def metrics_on_console(config: RunConfig, stage: Stage | type[Stage]) -> Sequence[str]:
    """Names of the metrics that the console shows: those of --log-metrics, or else those that the stage chooses.

    Raises:
        AgreedError: --log-metrics has a name that is not the name of a metric.
    """
    known = metric_names(config, stage)
    usual = [name for name in stage.shown_metrics if name in known]
    return shown_metrics(config.logging.log_metrics, usual, known)


def check_metrics(config: RunConfig, stage: type[Stage]) -> None:
    """Raise AgreedError if a setting names a metric that does not exist. This needs no data."""
    metrics_on_console(config, stage)
    best_checkpoint(config, stage)


def best_checkpoint(config: RunConfig, stage: Stage | type[Stage]) -> BestCheckpoint | None:
    """What compares the checkpoints of a run with --keep-best.

    Raises:
        AgreedError: --keep-best has a name that is not the name of a metric of which one value is better than another.
    """
    asked = config.checkpoint.keep_best
    return None if asked is None else BestCheckpoint(asked, stage.best_metrics(config))


def train(run: Run, make_stage: type[Stage]) -> None:
    """Make a stage and train it to its last iteration."""
    check_metrics(run.config, make_stage)
    try:
        trainer = Trainer(run, make_stage(run))
    except Interrupted as why:
        log.warning("stopped before the first step: %s", why)
        return
    show_banner(run, [*trainer.stage.summary(), *overlap(trainer.wrapped)])
    trainer.train()


class Trainer:
    """Trains a policy or reward model. It holds the model chunks, the optimizer and the schedule, and runs the loop."""

    _saved_at: int | None = None

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage = run, stage
        self.config, self.parallel = run.config, run.parallel
        check_warmup(self.config, stage.train_iters)
        head = spec_of(self.config).head
        self._chunks = run.build_model(head)
        self._weights_in_shards = False
        self.iteration = 0
        self._validated_at: int | None = None
        self._best = best_checkpoint(self.config, stage)
        self._started_from = None if run.start_from is None else str(run.start_from.path.resolve())
        if run.start_from is not None and not run.resuming:
            load_weights(run.start_from, self._chunks, head=head, verify=self.config.checkpoint.verify)
        fp8_state.scale_weights(self._chunks, self.parallel.groups.tp)
        self.wrapped = wrap_for_training(self._chunks, self.config, self.parallel)
        self.optimizer, self.scheduler = build_optimizer(self.wrapped, self.config, stage.train_iters)
        self.guard = StepGuard(self.config, self.parallel, self.wrapped, self.optimizer)
        if run.resuming:
            self._resume()
        self._saver = open_saver(run, self._started_from)
        # This comes last, so that a start that fails does not touch the files of an earlier run.
        self.logger = run.open_logger(stage.train_iters, metrics_on_console(self.config, stage))

    def gathered_chunks(self) -> list[Chunk]:
        """The model's chunks with whole weights.

        All ranks must call it: --overlap-param-gather leaves the weights in shards after an update; this gathers them.
        """
        if self._weights_in_shards:
            finish_param_gather(self.wrapped)
            self._weights_in_shards = False
        return self._chunks

    def train(self) -> dict[str, float]:
        """Train to the stage's last iteration. Validate, log and save on the way.

        Returns:
            the metrics of the last step and of the last validation.
        """
        try:
            return self._train()
        except FloatingPointError:
            # All ranks raise this, so they can finish an earlier checkpoint together.
            self.finish_saving()
            raise
        finally:
            self.logger.close()

    def _train(self) -> dict[str, float]:
        last, interval = self.stage.train_iters, self.config.checkpoint.save_interval
        shown: dict[str, float] = {}
        if self.iteration >= last:
            log.warning(
                "nothing is left to do: the run is at iteration %d of %d; raise --train-iters or --train-epochs",
                self.iteration,
                last,
            )
        stopping = self._asked_to_stop() or self._has_ended()
        # This includes the validation that an earlier run left out because it was asked to stop.
        if self._validation_is_due() and not stopping:
            shown |= self._validate()
            ended = self._has_ended()
            if self.iteration and (ended or self._is_best()):
                self._save_once()
            stopping = ended or self._asked_to_stop()
        while self.iteration < last and not stopping:
            # Where the process is asked to stop while responses are drawn, the step is not made.
            with contextlib.suppress(Interrupted):
                shown |= self._logged_step()
            done = self.iteration == last
            stopping = not done and self._asked_to_stop()
            # A run that is asked to stop has little time left: it saves at once, and validates when it is resumed.
            if self._validation_is_due() and not stopping:
                shown |= self._validate()
                stopping = not done and (self._has_ended() or self._asked_to_stop())
            if done or stopping or self._is_best() or (interval and self.iteration % interval == 0):
                self._save_once()
        self.finish_saving()
        return shown

    def step(self, micro_batches: Sequence[Sequence[Group]]) -> dict[str, float]:
        """One optimizer step over the global batch. The arguments are this replica's micro-batches of it.

        Raises:
            FloatingPointError: on all ranks, if the guard stops the run. The weights have not changed.
            RuntimeError: on all ranks, if the weights of replicas differ.
        """
        batches = pack_micro_batches(
            micro_batches,
            self.parallel,
            shared_prefix=self.stage.shared_prefix,
            multiple_of=self._chunks[0].packed_multiple,
        )
        batches = self.stage.prepare(self, batches)
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scales = fp8_state.save_scales(self._chunks)
        reports = forward_backward(self.wrapped, batches, self.stage.loss, self.parallel)
        self._weights_in_shards = False
        metrics = reduce_reports(
            reports, self.parallel, mean_names=self.stage.mean_metrics, max_names=self.stage.max_metrics
        )
        self.optimizer.prepare_grads()
        verdict = self.guard.inspect(
            self.iteration + 1, metrics["loss"], batches, self.stage.loss, shared_prefix=self.stage.shared_prefix
        )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if verdict.apply:
            self.stage.before_update(self, metrics)
            clip_and_step(self.optimizer, verdict.grad_norm, self.config.optimizer.clip_grad)
            self._weights_in_shards = self.config.optimizer.overlap_param_gather
            fp8_state.weights_changed(self._chunks)
        else:
            fp8_state.restore_scales(scales)
        self.scheduler.step(increment=1)
        self.iteration += 1
        if self.guard.compares_replicas_after(self.iteration):
            check_replicas(self.gathered_chunks(), self.parallel)
        metrics |= {"grad_norm": verdict.grad_norm, "lr": learning_rate, "skipped_steps": self.guard.skipped_steps}
        return metrics | count_tokens(batches, self.parallel, shared_prefix=self.stage.shared_prefix)

    def _logged_step(self) -> dict[str, float]:
        micro_batches = self.stage.micro_batches(self)
        start = time.perf_counter()
        metrics = self.step(micro_batches)
        seconds = time.perf_counter() - start
        metrics |= {"seconds_per_step": seconds, "tokens_per_second": metrics.pop("tokens") / seconds}
        metrics |= self.stage.after_step(self, metrics)
        self.logger.log(self.iteration, metrics)
        return metrics

    def _asked_to_stop(self) -> bool:
        """Whether any rank got a signal or its time is up. All ranks return the same, and the log says why.

        Raises:
            CheckpointError: on all ranks, if a save in the background has failed.
        """
        reason = signals.stop_reason(self.config.training.exit_duration_in_mins)
        save_failed = self._saver is not None and self._saver.failed
        stopping, save_failed = self.parallel.any_rank(reason is not None, save_failed)
        if save_failed:
            self.finish_saving()
        if stopping:
            reasons = enumerate(self.parallel.gather_over_world(reason))
            why = ", ".join(f"{text} (rank {rank})" for rank, text in reasons if text is not None)
            unsaved = "" if self.config.checkpoint.save else "; nothing is saved: --save is not set"
            log.warning("stopping at iteration %d: %s%s", self.iteration, why, unsaved)
        return stopping

    def _validation_is_due(self) -> bool:
        if self._validated_at == self.iteration:
            return False
        interval = self.config.training.eval_interval
        at_an_end = self.iteration in (0, self.stage.train_iters)
        return at_an_end or (interval is not None and self.iteration % interval == 0)

    def _validate(self) -> dict[str, float]:
        try:
            found = self.stage.validate(self)
        except Interrupted:  # The run saves and stops; the one that resumes it validates.
            return {}
        self._validated_at = self.iteration
        metrics = {f"validation/{name}": value for name, value in found.items()}
        if metrics:
            self.logger.log(self.iteration, metrics)
        if self._best is not None:
            self._best.see(self.iteration, metrics)
        return metrics

    def _has_ended(self) -> bool:
        """Whether the last validation ends the run. The log says why."""
        reason = self.stage.end_reason()
        if reason is not None:
            log.warning("ending at iteration %d of %d: %s", self.iteration, self.stage.train_iters, reason)
        return reason is not None

    def _is_best(self) -> bool:
        """Whether the weights are the best so far."""
        return self._best is not None and self._best.iteration == self.iteration

    def _save_once(self) -> None:
        """Save, unless the checkpoint of this iteration was saved before: a step that was not made changed nothing."""
        if self._saved_at != self.iteration:
            self.save()
            self._saved_at = self.iteration

    def save(self) -> None:
        """Write a checkpoint of the current iteration to --save, if that is set.

        With --async-save the checkpoint is complete only when a later `save` or `finish_saving` has returned.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written. The latest complete one is kept.
        """
        if self._saver is None:
            return
        state = TrainingState(
            trainer={
                "guard": self.guard.state_dict(),
                "started_from": self._started_from,
                "validated_at": self._validated_at,
                "best": None if self._best is None else self._best.state_dict(),
            },
            stage=self.stage.state_dict(),
            records=self.stage.records(self),
            best=None if self._best is None else self._best.iteration,
        )
        if self.config.checkpoint.save_optim:
            state.optimizer, state.scheduler = self.optimizer, self.scheduler
        self._saver.save(self.iteration, self.gathered_chunks(), state)

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is still being written.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        if self._saver is not None:
            self._saver.wait()

    def _resume(self) -> None:
        info = self.run.start_from
        load_training_state(
            info,
            self.gathered_chunks(),
            parallel=self.parallel,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            verify=self.config.checkpoint.verify,
        )
        self.guard.load_state_dict(info.trainer_state["guard"])
        self._started_from = info.trainer_state["started_from"]
        self._validated_at = info.trainer_state["validated_at"]
        if self._best is not None:
            self._best.load_state_dict(info.trainer_state.get("best"), same_folder=goes_on_in_place(self.run))
        self.stage.load_state_dict(info.stage_state, read_records(info))
        self.iteration = info.iteration
