"""The one training loop of all stages."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_brain.config.errors import ConfigError
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.models.provider import Head
from megatron_brain.training.checkpointing import load_training_state, load_weights, save_checkpoint
from megatron_brain.training.optimizer import (
    build_optimizer,
    check_optimizer_can_be_saved,
    clip_and_step,
    wrap_for_training,
)
from megatron_brain.training.report import LossOutput, reduce_reports
from megatron_brain.training.run import Run
from megatron_brain.training.schedule import forward_backward, pack_micro_batches

log = logging.getLogger(__name__)


class Stage(Protocol):
    """What a stage adds to the loop: its batches, its loss and what it measures."""

    head: Head
    mean_metrics: tuple[str, ...]
    """Names of the means its loss reports besides the loss."""
    max_metrics: tuple[str, ...]
    """Names of the maxima its loss reports."""
    shared_prefix: bool
    train_iters: int

    def micro_batches(self, trainer: "Trainer") -> Sequence[Sequence[Group]]:
        """This replica's micro-batches of the next step, the one after `trainer.iteration` steps."""

    def prepare(self, trainer: "Trainer", batches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """The step's packed micro-batches with what the loss must know of all of them before the first backward."""

    def loss(self, output: torch.Tensor, batch: PackedBatch) -> LossOutput:
        """Loss of a micro-batch from the head's output on the last pipeline stage."""

    def validate(self, trainer: "Trainer") -> dict[str, float]:
        """Metrics on held-out data, empty where the run has none."""

    def before_update(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """Look at the metrics of the step's loss before the weights move; may raise to stop the run."""

    def after_step(self, trainer: "Trainer", metrics: dict[str, float]) -> dict[str, float]:
        """Look at the metrics of the step just made; returns metrics of the stage to log beside them."""

    def state_dict(self) -> dict:
        """JSON-able state that resuming needs beyond the iteration."""

    def load_state_dict(self, state: dict) -> None:
        """Take up the state of an earlier run."""


class Trainer:
    """Policy or reward model in training: model chunks, optimizer and schedule, and the loop over them."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage = run, stage
        self.config, self.parallel = run.config, run.parallel
        check_optimizer_can_be_saved(self.config)
        warmup = self.config.optimizer.lr_warmup_iters
        if warmup and warmup >= stage.train_iters:
            raise ConfigError(f"lr_warmup_iters={warmup} must be less than the run's {stage.train_iters} iterations")
        self.chunks = run.build_model(stage.head)
        self.iteration = 0
        if run.start_from is not None and not run.resuming:
            load_weights(run.start_from, self.chunks, head=stage.head)
        self.wrapped = wrap_for_training(self.chunks, self.config, self.parallel)
        self.optimizer, self.scheduler = build_optimizer(self.wrapped, self.config, stage.train_iters)
        if run.resuming:
            self._resume()
        # Last: a start that fails leaves the files of an earlier run alone.
        self.logger = run.open_logger(stage.train_iters)

    def train(self) -> dict[str, float]:
        """Train to the stage's last iteration, validating, logging and saving on the way.

        Returns:
            the last step's metrics and the last validation's.
        """
        try:
            return self._train()
        finally:
            self.logger.close()

    def _train(self) -> dict[str, float]:
        settings, stage = self.config.training, self.stage
        last = stage.train_iters
        shown: dict[str, float] = {}
        if self.iteration == 0:
            shown |= self._validate()
        while self.iteration < last:
            shown |= self._logged_step()
            done = self.iteration == last
            if done or (settings.eval_interval and self.iteration % settings.eval_interval == 0):
                shown |= self._validate()
            interval = self.config.checkpoint.save_interval
            if done or (interval and self.iteration % interval == 0):
                self.save()
        return shown

    def step(self, micro_batches: Sequence[Sequence[Group]]) -> dict[str, float]:
        """One optimizer step over the global batch, of which these are this replica's micro-batches.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; the weights are untouched.
        """
        batches = pack_micro_batches(micro_batches, self.parallel, shared_prefix=self.stage.shared_prefix)
        batches = self.stage.prepare(self, batches)
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = forward_backward(self.wrapped, batches, self.stage.loss, self.parallel)
        metrics = reduce_reports(
            reports, self.parallel, mean_names=self.stage.mean_metrics, max_names=self.stage.max_metrics
        )
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        self._check_finite(metrics["loss"], grad_norm, batches)
        self.stage.before_update(self, metrics)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        clip_and_step(self.optimizer, grad_norm, self.config.optimizer.clip_grad)
        self.scheduler.step(increment=1)
        self.iteration += 1
        return metrics | {"grad_norm": grad_norm, "lr": learning_rate} | self._count_tokens(batches)

    def _logged_step(self) -> dict[str, float]:
        micro_batches = self.stage.micro_batches(self)
        start = time.perf_counter()
        metrics = self.step(micro_batches)
        seconds = time.perf_counter() - start
        metrics |= {"seconds_per_step": seconds, "tokens_per_second": metrics.pop("tokens") / seconds}
        metrics |= self.stage.after_step(self, metrics)
        self.logger.log(self.iteration, metrics)
        return metrics

    def _validate(self) -> dict[str, float]:
        metrics = {f"validation/{name}": value for name, value in self.stage.validate(self).items()}
        if metrics:
            self.logger.log(self.iteration, metrics)
        return metrics

    def _count_tokens(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        counts = [
            sum(
                group.num_tokens(shared_prefix=self.stage.shared_prefix) for batch in batches for group in batch.groups
            ),
            sum(batch.tokens.numel() for batch in batches),
            sum(batch.targets.numel() for batch in batches),
            sum(batch.num_responses for batch in batches),
        ]
        total = self.parallel.sum_over_data_parallel(
            torch.tensor(counts, dtype=torch.float64, device=self.parallel.device)
        ).tolist()
        return {
            "tokens": total[0],
            "padding_fraction": 1 - total[0] / total[1],
            "response_length": total[2] / total[3],
        }

    def _check_finite(self, loss: float, grad_norm: float, batches: Sequence[PackedBatch]) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        records = [group.record_id for batch in batches for group in batch.groups]
        raise FloatingPointError(
            f"step {self.iteration + 1}: loss {loss}, gradient norm {grad_norm}. The step was not applied. "
            f"Records of rank {self.parallel.rank}: {', '.join(records)}. A lower --lr or --clip-grad may help."
        )

    def save(self) -> None:
        """Write a checkpoint of the current iteration to --save, where one is set."""
        checkpoint = self.config.checkpoint
        if checkpoint.save is None:
            return
        save_checkpoint(
            checkpoint.save,
            self.iteration,
            chunks=self.chunks,
            head=self.stage.head,
            config=self.config,
            tokenizer=self.run.tokenizer,
            parallel=self.parallel,
            optimizer=self.optimizer if checkpoint.save_optim else None,
            scheduler=self.scheduler if checkpoint.save_optim else None,
            stage_state=self.stage.state_dict(),
        )
        log.info("saved %s at iteration %d", checkpoint.save, self.iteration)

    def _resume(self) -> None:
        info = self.run.start_from
        if info.stage != self.config.stage:
            raise ConfigError(
                f"{info.path} is of the {info.stage} stage and cannot be resumed by {self.config.stage}: "
                "add --finetune to start from its weights"
            )
        load_training_state(
            info, self.chunks, parallel=self.parallel, optimizer=self.optimizer, scheduler=self.scheduler
        )
        self.stage.load_state_dict(info.stage_state)
        self.iteration = info.iteration
