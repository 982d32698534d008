"""An opened run: everything that a stage needs from outside."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_brain.checkpointing import CheckpointInfo, load_weights, require_files
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.loader import config_to_yaml, save_config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import Head, RecordSource, spec_of
from megatron_brain.conversion import load_hf_weights
from megatron_brain.data.corpus import Corpus, read_corpus
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.models.fp8.state import without_history
from megatron_brain.models.fp8.weights import written
from megatron_brain.models.provider import Chunk, build_model
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.startup.disk import FrozenCheckpoint
from megatron_brain.startup.resolved import ResolvedRun
from megatron_brain.training.metrics import MetricsLogger
from megatron_brain.training.same_data import read_on_all, require_same_data

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """An opened run: the resolved settings and checkpoints, and the connected processes."""

    resolved: ResolvedRun
    config: RunConfig
    """The resolved settings, with the date for chat templates that all ranks agreed on."""
    parallel: Parallel
    tokenizer: Tokenizer
    in_use: set[Path] = field(default_factory=set)
    """Checkpoints that this run, or a run that resumes it, may read again."""
    corpora: dict[str, Corpus] = field(default_factory=dict)
    """What `read` has read so far, by the name of the setting."""

    @property
    def start_from(self) -> CheckpointInfo | None:
        """The checkpoint that the weights come from, or None."""
        return self.resolved.start.checkpoint

    @property
    def resuming(self) -> bool:
        """Whether the optimizer's state and the position in the data also come from the checkpoint."""
        return self.resolved.start.resuming

    def read(self, source: RecordSource) -> Sequence[Any]:
        """The items of a source, the same on all ranks; none if the source is not set. All ranks must call it.

        Raises:
            AgreedError: on all ranks: a record is bad, prepared data do not fit the run, or a rank has read other
                records than rank 0.
        """
        place = source.place(self.config)
        if place is None:
            return []
        split, limit = source.chosen(self.config)
        reader = spec_of(self.config).reader_of(source, self.config, self.tokenizer)
        corpus = read_on_all(lambda: read_corpus(place, reader, split=split, limit=limit), self.parallel)
        require_same_data(corpus, reader, f"{source.flag} {place}", self.parallel)
        self.corpora[source.name] = corpus
        return corpus.items

    def build_model(self, head: Head) -> list[Chunk]:
        """Model chunks with the weights of --hf-model, or random weights. A checkpoint replaces them later."""
        model, start = self.config.model, self.resolved.start
        complete = start.checkpoint is not None and start.checkpoint.head == head
        fp8 = self.config.fp8 if spec_of(self.config).trains else without_history(self.config.fp8)
        seed = None if complete else self.config.training.seed
        chunks = self._build(model, head, seed=seed, fp8=fp8)
        if start.hf_model is not None:
            with written(chunks):
                load_hf_weights(start.hf_model, chunks, model, head)
        elif start.checkpoint is None:
            log.warning("no --load and no --hf-model: training starts from random weights")
        return chunks

    def load_frozen(self, found: FrozenCheckpoint) -> list[Chunk]:
        """A frozen model on the run's layout, in evaluation mode."""
        if self.config.checkpoint.verify:
            require_files(found.info)
        head = found.info.head
        # Modules draw initial values that nobody uses. When a model is loaded must not change what the run draws.
        with torch.random.fork_rng(devices=[]):
            chunks = self._build(found.model, head, seed=None, fp8=without_history(self.config.fp8))
        load_weights(found.info, chunks, head=head, verify=self.config.checkpoint.verify)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        return chunks

    def _build(self, model: ModelConfig, head: Head, *, seed: int | None, fp8: Fp8Config) -> list[Chunk]:
        layers = self.resolved.layers
        return build_model(model, self.config.parallel, self.parallel, head=head, seed=seed, fp8=fp8, layers=layers)

    def open_logger(self, total_steps: int, shown: Sequence[str]) -> MetricsLogger:
        """The metrics logger, in --tensorboard-dir or else --save. The resolved configuration is written there too."""
        directory = self.config.logging.tensorboard_dir or self.config.checkpoint.save
        logger = MetricsLogger(
            directory,
            total_steps=total_steps,
            shown=shown,
            is_writer=self.parallel.is_writer,
            progress=self.config.logging.progress,
            log_interval=self.config.logging.log_interval,
            resume_step=self.start_from.iteration if self.resuming else None,
        )
        logger.log_config(config_to_yaml(self.config))
        if directory is not None and self.parallel.is_writer:
            save_config(self.config, Path(directory) / "config.yaml")
        return logger
