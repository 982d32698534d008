"""The guard applies a step's update only if its loss and gradient are finite and not a spike."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

from megatron_brain.config.run import RunConfig
from megatron_brain.data.groups import PackedBatch
from megatron_brain.runtime.megatron_versions import grads_for_norm
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.runtime.random_state import random_state, set_random_state
from megatron_brain.training.report import LossOutput
from megatron_brain.training.reproduction import (
    MicroBatchResult,
    Reproduction,
    run_alone,
    write_reproduction,
    zero_gradients,
)

log = logging.getLogger(__name__)

_SHOWN = 4
"""A message names at most this many ranks, parameters and records."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether to apply the update, and the global gradient norm before clipping."""

    apply: bool
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What is known of a step between its backward pass and its update."""

    iteration: int
    batches: Sequence[PackedBatch]
    loss_function: Callable[[torch.Tensor, PackedBatch], LossOutput]
    shared_prefix: bool


class StepGuard:
    """Judges every step before its update. All ranks decide alike. As long as nothing is wrong, this needs no
    collective of its own: a rank that alone finds a problem puts a NaN into the reduction of the gradient norm.

    Replicas learn of each other's problems because the loss and the gradients are reduced over replicas before the norm
    is computed.
    """

    def __init__(
        self,
        config: RunConfig,
        parallel: Parallel,
        wrapped: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        self._config, self._settings, self._parallel = config, config.guards, parallel
        self._wrapped, self._optimizer = wrapped, optimizer
        directory = config.logging.tensorboard_dir or config.checkpoint.save
        self._directory = None if directory is None else Path(directory) / "nonfinite"
        self._losses: deque[float] = deque(maxlen=self._settings.loss_spike_window)
        self._skipped_in_a_row: list[str] = []
        self.skipped_steps = 0
        """How many steps of the whole run were skipped."""

    def inspect(
        self,
        iteration: int,
        loss: float,
        batches: Sequence[PackedBatch],
        loss_function: Callable[[torch.Tensor, PackedBatch], LossOutput],
        *,
        shared_prefix: bool,
    ) -> Verdict:
        """Judge a step whose gradients are reduced and prepared. All ranks must call it.

        Args:
            iteration: the step's number, from 1.
            loss: mean over the global batch.
            batches: this replica's micro-batches, as the loss saw them.

        Raises:
            FloatingPointError: on all ranks, if --on-nan or --on-spike is `stop`, or if too many steps in a row were
                skipped. Weights and optimizer state have not changed.
        """
        doubt = not math.isfinite(loss) or self._is_loss_spike(loss) or self._has_uncounted_nonfinite()
        grad_norm = _global_grad_norm(self._optimizer, self._parallel.device, doubt=doubt)
        if math.isfinite(grad_norm) and not self._is_norm_spike(grad_norm):
            return self._apply(loss, grad_norm)
        step = _Step(iteration=iteration, batches=batches, loss_function=loss_function, shared_prefix=shared_prefix)
        return self._judge(step, loss)

    def compares_replicas_after(self, iteration: int) -> bool:
        """Whether the weights of the replicas must be compared after this step."""
        interval = self._settings.check_replicas_interval
        return interval is not None and iteration % interval == 0

    def state_dict(self) -> dict:
        """The state as JSON-able values. It is the same on all ranks."""
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": list(self._skipped_in_a_row),
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned. If the window is shorter now, only the latest losses are kept."""
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = list(state["skipped_in_a_row"])
        self._losses = deque(state["losses"], maxlen=self._settings.loss_spike_window)

    def _apply(self, loss: float, grad_norm: float) -> Verdict:
        self._losses.append(loss)
        self._skipped_in_a_row.clear()
        return Verdict(apply=True, grad_norm=grad_norm)

    def _is_loss_spike(self, loss: float) -> bool:
        factor = self._settings.loss_spike_factor
        if factor is None or len(self._losses) < self._settings.loss_spike_window:
            return False
        median = statistics.median(self._losses)
        return median > 0 and loss > factor * median

    def _is_norm_spike(self, grad_norm: float) -> bool:
        limit = self._settings.grad_norm_limit
        return limit is not None and grad_norm > limit

    def _has_uncounted_nonfinite(self) -> bool:
        """Whether this rank has a non-finite gradient that the global norm counts on tensor-parallel rank 0 only."""
        if self._parallel.tp_rank == 0:
            return False
        copies = [
            p.main_grad
            for chunk in self._wrapped
            for p in chunk.parameters()
            if p.requires_grad and not getattr(p, "tensor_model_parallel", False)
        ]
        return bool(copies) and not math.isfinite(torch.stack(torch._foreach_norm(copies)).sum().item())

    def _judge(self, step: _Step, loss: float) -> Verdict:
        """The verdict of all ranks, where at least one of them found a problem."""
        uncounted = self._has_uncounted_nonfinite()
        grad_norm = _global_grad_norm(self._optimizer, self._parallel.device, doubt=False)
        finite = math.isfinite(loss) and math.isfinite(grad_norm) and not uncounted
        spike = self._is_loss_spike(loss) or self._is_norm_spike(grad_norm)
        facts = self._parallel.gather_over_world((finite, spike, loss))
        all_finite = all(finite for finite, *_ in facts)
        # Tensor-parallel ranks may see different losses: the message names the worst.
        worst = max((loss for *_, loss in facts), key=lambda value: (not math.isfinite(value), value))
        text = f"step {step.iteration}: loss {worst:.6g}, gradient norm {grad_norm:.6g}"
        if not all_finite:
            flag, action = "--on-nan", self._settings.on_nan
            text = f"{text}. {self._find_culprits(step, grad_norm)}"
        elif any(spike for _, spike, _ in facts):
            flag, action = "--on-spike", self._settings.on_spike
            text = f"{text}: a spike ({self._limits()})"
        else:
            return self._apply(loss, grad_norm)
        if action == "warn":
            log.warning("%s. The update is applied", text)
            return self._apply(loss, grad_norm)
        if action == "stop":
            cure = f"A lower --lr or --clip-grad may help; {flag} skip goes on without the step"
            raise FloatingPointError(f"{text}. The step was not applied. {cure}")
        self._skip(text)
        return Verdict(apply=False, grad_norm=grad_norm)

    def _skip(self, text: str) -> None:
        self._skipped_in_a_row.append(text)
        self.skipped_steps += 1
        zero_gradients(self._wrapped)
        self._optimizer.zero_grad()
        limit = self._settings.max_consecutive_skips
        if len(self._skipped_in_a_row) > limit:
            history = "\n".join(self._skipped_in_a_row)
            raise FloatingPointError(
                f"{limit + 1} steps in a row could not be applied, --max-consecutive-skips is {limit}:\n{history}"
            )
        log.warning("%s. The step is skipped (%d in a row, at most %d)", text, len(self._skipped_in_a_row), limit)

    def _limits(self) -> str:
        """The limits that are set, with their current values, in words."""
        settings, parts = self._settings, []
        if settings.loss_spike_factor is not None and len(self._losses) == settings.loss_spike_window:
            median = statistics.median(self._losses)
            parts.append(f"--loss-spike-factor {settings.loss_spike_factor:g}, median loss {median:.6g}")
        if settings.grad_norm_limit is not None:
            parts.append(f"--grad-norm-limit {settings.grad_norm_limit:g}")
        return "; ".join(parts)

    def _find_culprits(self, step: _Step, grad_norm: float) -> str:
        """Run every micro-batch of the step again alone. Returns what each rank saw, in words, the same on all ranks.

        Random generators keep their state; the gradients are zero afterwards.
        """
        before = random_state()
        results = [run_alone(self._wrapped, batch, step.loss_function, self._parallel) for batch in step.batches]
        set_random_state(before)
        self._optimizer.zero_grad()
        failed = [number for number, result in enumerate(results) if not result.is_finite]
        mine = self._report(step, grad_norm, results, failed) if failed else None
        lines = [line for line in self._parallel.gather_over_world(mine) if line is not None]
        if not lines:
            return (
                "No micro-batch run alone gives a loss or gradient that is not finite: their sum overflows, the "
                "reduction between ranks failed, or it takes the random numbers dropout had in the step"
            )
        more = f"; and {len(lines) - _SHOWN} more ranks" if len(lines) > _SHOWN else ""
        return "; ".join(lines[:_SHOWN]) + more

    def _report(self, step: _Step, grad_norm: float, results: Sequence[MicroBatchResult], failed: Sequence[int]) -> str:
        """Write this rank's reproduction file and return this rank's line of the message."""
        parallel, batch, result = self._parallel, step.batches[failed[0]], results[failed[0]]
        found = Reproduction(
            iteration=step.iteration,
            stage=self._config.stage,
            seed=self._config.training.seed,
            layout=parallel.layout,
            rank=parallel.rank,
            pipeline_rank=parallel.pp_rank,
            tensor_rank=parallel.tp_rank,
            data_rank=parallel.dp_rank,
            micro_batch=failed[0],
            other_micro_batches=tuple(failed[1:]),
            loss=result.loss,
            grad_norm=grad_norm,
            nonfinite_parameters=result.nonfinite_parameters,
            shared_prefix=step.shared_prefix,
            length=batch.tokens.size(1),
            temperature=batch.temperature,
            known_gradient=None if batch.known_gradient is None else tuple(batch.known_gradient.tolist()),
            known_loss=batch.known_loss,
            groups=batch.groups,
        )
        return f"{_describe(found)}; {self._write(found)}"

    def _write(self, found: Reproduction) -> str:
        if self._directory is None:
            return "no reproduction file, for neither --save nor --tensorboard-dir is set"
        path = self._directory / f"iter_{found.iteration:07d}_rank_{found.rank:05d}.json"
        try:
            write_reproduction(path, found)
        except OSError as error:
            # The other ranks wait for the line of this rank.
            return f"no reproduction file: {error}"
        return f"reproduction {path}"


def _global_grad_norm(optimizer: MegatronOptimizer, device: torch.device, *, doubt: bool) -> float:
    """`optimizer.get_grad_norm()`, or NaN on all ranks that share the norm if `doubt` is true on one of them."""
    grads = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        grads += grads_for_norm(part)
    if doubt:
        grads.append(torch.full((1,), torch.nan, device=device))
    return float(get_grad_norm_fp32(grads, grad_stats_parallel_group=optimizer.get_grad_stats_parallel_group()))


def _describe(found: Reproduction) -> str:
    where = f"pipeline {found.pipeline_rank}, tensor {found.tensor_rank}, data {found.data_rank}"
    numbers = ", ".join(map(str, (found.micro_batch, *found.other_micro_batches)))
    text = f"Global rank {found.rank} ({where}), micro-batch {numbers}: loss {found.loss:.6g}"
    if found.nonfinite_parameters:
        text += f", gradient not finite in {_some(found.nonfinite_parameters)}"
    return f"{text}; records {_some([group.record_id for group in found.groups])}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
