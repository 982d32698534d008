"""Everything a stage needs around it, opened in the order that lets mistakes stop a run before it starts."""

import dataclasses
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_brain.checkpointing import CheckpointInfo, has_checkpoint, load_weights, read_info
from megatron_brain.config.checks import validate_layout
from megatron_brain.config.data import TokenizerConfig
from megatron_brain.config.errors import ConfigError
from megatron_brain.config.loader import config_to_yaml, save_config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import STAGE_SECTIONS, RunConfig
from megatron_brain.conversion import load_hf_weights, read_hf_architecture
from megatron_brain.conversion.generation_config import read_generation_config
from megatron_brain.data.tokenizer import Tokenizer, build_tokenizer, check_fits
from megatron_brain.models.architecture import ARCHITECTURE_FIELDS, resolve
from megatron_brain.models.provider import Chunk, Head, build_model
from megatron_brain.models.specs import choose_transformer_impl
from megatron_brain.runtime import parallel as runtime
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.training.metrics import MetricsLogger

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """An opened run.

    `config` has the model's sizes resolved. `start_from` is the checkpoint its weights come from, if any;
    `resuming` says that optimizer and position come from it too.
    """

    config: RunConfig
    parallel: Parallel
    tokenizer: Tokenizer
    start_from: CheckpointInfo | None
    resuming: bool
    in_use: set[Path] = field(default_factory=set)
    """Checkpoints that this run, or one that resumes it, may read again."""
    generation_config: dict = field(default_factory=dict)
    """generation_config.json of the Hugging Face model that the weights come from, for the checkpoints."""

    def build_model(self, head: Head) -> list[Chunk]:
        """Model chunks with the weights of --hf-model, or random ones; a checkpoint is loaded over them."""
        model = self.config.model
        complete = self.start_from is not None and self.start_from.head == head
        seed = None if complete else self.config.training.seed
        chunks = build_model(model, self.config.parallel, self.parallel, head=head, seed=seed, fp8=self.config.fp8)
        if self.start_from is None and model.hf_model is not None:
            load_hf_weights(model.hf_model, chunks, model, head)
        elif self.start_from is None:
            log.warning("no --load and no --hf-model: training starts from random weights")
        return chunks

    def load_frozen(self, directory: str, head: Head) -> list[Chunk]:
        """A model that only scores, on the run's layout, in evaluation mode.

        Raises:
            ValueError: the model's vocabulary is another one, or the layout does not fit it.
        """
        info = read_info(directory)
        model = resolve(_without_sizes(self.config.model), info.architecture, str(info.path))
        if model.vocab_size != self.config.model.vocab_size:
            raise ValueError(
                f"{info.path} has vocab_size={model.vocab_size}, the policy has {self.config.model.vocab_size}: "
                "all models of a run share one tokenizer"
            )
        validate_layout(dataclasses.replace(self.config, model=model), self.parallel.world_size, model)
        # Modules draw initial values that nobody uses: what a run draws must not depend on when a scorer is loaded.
        with torch.random.fork_rng(devices=[]):
            chunks = build_model(model, self.config.parallel, self.parallel, head=head, seed=None, fp8=self.config.fp8)
        load_weights(info, chunks, head=head)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        return chunks

    def open_logger(self, total_steps: int) -> MetricsLogger:
        """The run's metrics logger, in --tensorboard-dir or else --save, where the resolved configuration goes too."""
        directory = self.config.logging.tensorboard_dir or self.config.checkpoint.save
        logger = MetricsLogger(
            directory,
            total_steps=total_steps,
            is_writer=self.parallel.is_writer,
            progress=self.config.logging.progress,
            log_interval=self.config.logging.log_interval,
            resume_step=self.start_from.iteration if self.resuming else None,
        )
        logger.log_config(config_to_yaml(self.config))
        if directory is not None and self.parallel.is_writer:
            save_config(self.config, Path(directory) / "config.yaml")
        return logger


def open_run(config: RunConfig) -> Run:
    """Resolve the model, check the layout, then start processes.

    Raises:
        ValueError: anything the user asked for that cannot be; nothing has been started by then.
    """
    _set_up_logging()
    start_from, resuming = _find_start(config)
    generation_config = {}
    if start_from is not None:
        found, source = start_from.architecture, str(start_from.path)
        generation_config = start_from.generation_config
    elif config.model.hf_model is not None:
        found, source = read_hf_architecture(config.model.hf_model), config.model.hf_model
        generation_config = read_generation_config(config.model.hf_model)
    else:
        found, source = None, "the flags"
    config = dataclasses.replace(config, model=resolve(config.model, found, source))
    validate_layout(config, runtime.launched_world_size(), config.model)
    tokenizer, config = _open_tokenizer(config, start_from)
    check_fits(tokenizer, config.model.vocab_size)
    parallel = runtime.start(config.parallel, seed=config.training.seed, num_layers=config.model.num_layers)
    impl, reason = choose_transformer_impl(config.model.transformer_impl, parallel.device)
    log.info("transformer implementation: %s (%s)", impl, reason)
    _check_same_start(parallel, start_from, resuming=resuming)
    return Run(
        config=config,
        parallel=parallel,
        tokenizer=tokenizer,
        start_from=start_from,
        resuming=resuming,
        generation_config=generation_config,
    )


def _check_same_start(parallel: Parallel, start_from: CheckpointInfo | None, *, resuming: bool) -> None:
    """Each rank has looked for itself, maybe on storage that another job writes to or that shows nodes old contents."""
    mine = None if start_from is None else (start_from.path.name, resuming)
    found = parallel.gather_over_world(mine)
    if len(set(found)) > 1:
        told = "; ".join(f"rank {rank}: {start[0] if start else 'none'}" for rank, start in enumerate(found))
        raise RuntimeError(
            f"ranks found different checkpoints to start from: {told}. Name one iter_ folder with --load"
        )


def _find_start(config: RunConfig) -> tuple[CheckpointInfo | None, bool]:
    """The checkpoint to start from, and whether to resume it rather than take its weights alone."""
    checkpoint = config.checkpoint
    if checkpoint.auto_resume and has_checkpoint(checkpoint.save):
        return read_info(checkpoint.save), True
    if checkpoint.load is None:
        return None, False
    trains = "optimizer" in STAGE_SECTIONS[config.stage]
    return read_info(checkpoint.load), trains and not checkpoint.finetune


def _open_tokenizer(config: RunConfig, start_from: CheckpointInfo | None) -> tuple[Tokenizer, RunConfig]:
    kind, place = locate_tokenizer(config.tokenizer, start_from, config.model.hf_model)
    # A place that was not given is left unsaid in the settings that are written: the checkpoint there may be removed.
    settings = dataclasses.replace(config.tokenizer, tokenizer_type=kind)
    return build_tokenizer(kind, place), dataclasses.replace(config, tokenizer=settings)


def locate_tokenizer(
    asked: TokenizerConfig, start_from: CheckpointInfo | None, hf_model: str | None
) -> tuple[str, str]:
    """Type and place of the tokenizer: the one asked for, or else the checkpoint's or the Hugging Face model's.

    Raises:
        ConfigError: none of them is given.
    """
    if asked.tokenizer_model is not None:
        return asked.tokenizer_type, asked.tokenizer_model
    if start_from is not None:
        return start_from.tokenizer_type, str(start_from.tokenizer_dir)
    if hf_model is not None:
        return "HuggingFaceTokenizer", hf_model
    raise ConfigError("no tokenizer: give --tokenizer-model, or --load or --hf-model which bring one")


def _without_sizes(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, **dict.fromkeys(ARCHITECTURE_FIELDS))


def _set_up_logging() -> None:
    level = logging.INFO if runtime.is_launch_writer() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_brain").setLevel(level)
