"""Writes checkpoints, while training waits or in the background."""

import dataclasses
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_brain.checkpointing import folders
from megatron_brain.checkpointing.boxes import Box, share_of
from megatron_brain.checkpointing.errors import CheckpointError
from megatron_brain.checkpointing.folders import CheckpointInfo
from megatron_brain.checkpointing.index import DATA_FILES, read_index
from megatron_brain.checkpointing.state import (
    fp8_boxes,
    optimizer_boxes,
    optimizer_steps,
    random_boxes,
    stored_weights,
)
from megatron_brain.checkpointing.storage import write_boxes
from megatron_brain.config.loader import save_config
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.files import sync_tree
from megatron_brain.models.architecture import architecture
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.runtime.random_state import random_state

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingState:
    """The contents of a checkpoint besides weights, configuration and tokenizer."""

    optimizer: MegatronOptimizer | None = None
    scheduler: OptimizerParamScheduler | None = None
    """Optimizer and scheduler are given together or not at all. Without them a run cannot resume."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """JSON-able state of the loop, the same on all ranks."""
    stage: dict[str, Any] = field(default_factory=dict)
    """JSON-able state of the stage, the same on all ranks."""
    records: Collection[dict[str, Any]] = ()
    """JSON-able records of this replica."""
    best: int | None = None
    """Iteration of the run's best checkpoint in this folder, perhaps this one; None: the run looks for none."""


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that `tokenizer.save` writes, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        tokenizer.save(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish_checkpoint(
    info: CheckpointInfo, config: RunConfig, tokenizer: Mapping[str, bytes], *, best: int | None = None
) -> None:
    """Complete a folder that `folders.begin` made and that holds tensors with their index, then give it its name.

    Args:
        info: its `path` is the final place of the checkpoint.
        config: configuration with the model's sizes resolved.
        tokenizer: what `tokenizer_files` returned.
        best: `TrainingState.best`.

    Raises:
        ConfigError: some tensors are missing; nothing is published.
    """
    root = info.path.parent
    partial = folders.partial_dir(root, info.iteration)
    read_index(partial)
    for name, contents in tokenizer.items():
        path = partial / "tokenizer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    save_config(config, partial / "config.yaml")
    dataclasses.replace(info, files=folders.list_files(partial)).write(partial)
    sync_tree(partial, but=DATA_FILES)  # The data files are synced already.
    folders.publish(root, info.iteration, best)


class CheckpointSaver:
    """Writes a run's checkpoints into --save.

    All ranks call every method. With --async-save, `save` copies what is to be written and returns; a thread writes it
    while training goes on, and one save ends before the next starts. In both cases the files are complete and synced
    on all ranks before the checkpoint gets its name.

    Args:
        root: the folder --save.
        config: configuration with the model's sizes resolved.
        generation_config: goes into each checkpoint's CheckpointInfo.
        protected: checkpoints that --keep-latest must not remove. It is read at each removal.
    """

    def __init__(
        self,
        root: str | Path,
        config: RunConfig,
        parallel: Parallel,
        tokenizer: Tokenizer,
        *,
        head: Head,
        generation_config: dict[str, Any] | None = None,
        protected: Collection[Path] = (),
    ) -> None:
        self._config, self._parallel, self._head = config, parallel, head
        self.root = Path(root)
        # They are read now, because two threads may not use a tokenizer at the same time.
        self._tokenizer_files = tokenizer_files(tokenizer) if parallel.is_writer else {}
        self._generation_config = generation_config or {}
        self._protected = protected
        # It has its own group, so that a save in the background does not mix with the collectives of training.
        self._group = parallel.host_group()
        self._copies = _HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_first = True

    def save(self, iteration: int, chunks: Sequence[Chunk], state: TrainingState) -> None:
        """Write a checkpoint, or begin to write it in the background.

        Raises:
            CheckpointError: this save, or the previous one in the background, failed on some rank. The checkpoint that
                latest_checkpointed_iteration.txt names is unchanged.
        """
        if self.in_progress:
            log.warning("waiting for the checkpoint before, which is still being written: saves follow too fast")
        self.wait()
        boxes = self._boxes(chunks, state)
        info = self._info(iteration, chunks, state)
        records, best = list(state.records), state.best
        if not self._config.checkpoint.async_save:
            self._write(boxes, info, records, best)
            return
        boxes = self._copies.take(boxes)
        # The device makes the copies asynchronously.
        self._parallel.synchronize()

        def write() -> None:
            try:
                self._parallel.claim_device()
                self._write(boxes, info, records, best)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def in_progress(self) -> bool:
        """Whether this rank is writing a checkpoint in the background."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this rank. The next call of `wait` raises its error."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until the save in the background has ended.

        Raises:
            CheckpointError: the save failed on some rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _boxes(self, chunks: Sequence[Chunk], state: TrainingState) -> list[Box]:
        """The boxes that this rank writes. Data-parallel replicas divide the boxes that all of them have."""
        shared, own = stored_weights(state.optimizer, chunks)
        shared += fp8_boxes(chunks)
        if state.optimizer is not None:
            distributed = self._config.optimizer.use_distributed_optimizer
            (own if distributed else shared).extend(optimizer_boxes(state.optimizer, chunks))
            own += random_boxes(random_state(), self._parallel)
        return own + share_of(shared, self._parallel.dp_rank, self._parallel.dp_size)

    def _info(self, iteration: int, chunks: Sequence[Chunk], state: TrainingState) -> CheckpointInfo:
        trainer = dict(state.trainer)
        if state.optimizer is not None:
            assert state.scheduler is not None
            trainer |= {
                "optimizer_steps": optimizer_steps(state.optimizer),
                "scheduler": state.scheduler.state_dict(),
                "fp8": fp8_state.summary(chunks),
            }
        return CheckpointInfo(
            path=folders.iteration_dir(self.root, iteration),
            iteration=iteration,
            stage=self._config.stage,
            head=self._head,
            architecture=architecture(self._config.model),
            tokenizer_type=self._config.tokenizer.tokenizer_type,
            stage_state=state.stage,
            trainer_state=trainer,
            has_optimizer=state.optimizer is not None,
            bf16=self._config.model.bf16,
            layout=self._parallel.layout,
            generation_config=self._generation_config,
            template_date=self._config.tokenizer.template_date or "",
        )

    def _write(
        self, boxes: Sequence[Box], info: CheckpointInfo, records: list[dict[str, Any]], best: int | None
    ) -> None:
        """Write, sync and publish. Each step begins only after the step before has succeeded on all ranks."""
        started = time.perf_counter()
        partial = folders.partial_dir(self.root, info.iteration)
        parallel = self._parallel
        first, self._is_first = self._is_first, False

        def begin() -> None:
            if first:
                folders.remove_leftovers(self.root)
            folders.begin(self.root, info.iteration)

        def write() -> None:
            write_boxes(boxes, partial, self._group)
            if parallel.leads_replica:
                folders.write_records(partial, parallel.dp_rank, records)

        def finish() -> None:
            publish_checkpoint(info, self._config, self._tokenizer_files, best=best)

        self._on_all(info, begin if parallel.is_writer else None)
        self._on_all(info, write)
        self._on_all(info, finish if parallel.is_writer else None)
        log.info("saved %s in %.1f s", info.path, time.perf_counter() - started)
        # Nobody waits for this.
        if parallel.is_writer and self._config.checkpoint.keep_latest:
            folders.keep_latest(self.root, info.iteration, self._config.checkpoint.keep_latest, self._protected)

    def _on_all(self, info: CheckpointInfo, action: Callable[[], None] | None) -> None:
        """Do this rank's action, then raise on all ranks the errors of any rank."""
        words: str | None = None
        cause: Exception | None = None
        try:
            if action is not None:
                action()
        except CheckpointError as error:
            words, cause = str(error), error
        except Exception as error:
            words, cause = f"rank {self._parallel.rank}: {type(error).__name__}: {error}", error
        errors = self._parallel.gather_over_world(words, self._group)
        found = "; ".join(dict.fromkeys(e for e in errors if e))
        if found:
            raise CheckpointError(
                f"iteration {info.iteration} could not be saved to {self.root}: {found}. What "
                f"{folders.LATEST} names there is complete: free space or repair the folder, then --auto-resume"
            ) from cause


class _HostCopies:
    """Copies boxes into host memory, where training does not change them. The memory is kept for the next save."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, torch.Tensor] = {}

    def take(self, boxes: Sequence[Box]) -> list[Box]:
        """The same boxes with copies of their values. The copies are complete once the device is synchronized."""
        used = dict.fromkeys((box.data.dtype for box in boxes), 0)
        for dtype in used:
            self._reserve(dtype, [box for box in boxes if box.data.dtype == dtype])
        copies = []
        for box in boxes:
            dtype, size = box.data.dtype, box.data.numel()
            place = self._memory[dtype][used[dtype] : used[dtype] + size].view(box.data.shape)
            used[dtype] += size
            place.copy_(box.data, non_blocking=True)
            copies.append(Box(key=box.key, shape=box.shape, offset=box.offset, data=place))
        return copies

    def _reserve(self, dtype: torch.dtype, boxes: Sequence[Box]) -> None:
        size = sum(box.data.numel() for box in boxes)
        if dtype not in self._memory or self._memory[dtype].numel() < size:
            # All boxes share one piece, because each piece of pinned memory is rounded up to a power of two.
            self._memory[dtype] = torch.empty(size, dtype=dtype, pin_memory=boxes[0].data.is_cuda)
