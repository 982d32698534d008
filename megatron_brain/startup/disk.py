"""What a run reads on disk before it starts: the weights to start from, and the frozen models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from megatron_brain.checkpointing import CheckpointInfo, has_checkpoint, read_info, require_files
from megatron_brain.config.checks import validate_layout
from megatron_brain.config.model import ModelConfig, ResolvedModel
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import Head, spec_of
from megatron_brain.conversion import read_hf_architecture
from megatron_brain.conversion.generation_config import read_generation_config
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import ARCHITECTURE_FIELDS, resolve


@dataclass
class Search:
    """What is looked for on this machine, and what was found.

    A start needs everything: the code that reads a missing file refuses it. A dry run may be made on a machine that
    lacks weights and data: it notes what is elsewhere, and goes on without it.
    """

    may_be_elsewhere: bool = False
    checked: list[str] = field(default_factory=list)
    """What was looked at, in words."""
    absent: list[str] = field(default_factory=list)
    """What is not on this machine and was not looked at, in words."""

    def finds(self, flag: str, place: str, what: str) -> bool:
        """Whether to look at a place. A missing place that may be elsewhere is noted with `what` it would tell."""
        here = not self.may_be_elsewhere or Path(place).exists()
        if not here:
            self.absent.append(f"{flag} {place}: {what}")
        return here


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the weights of a run come from."""

    checkpoint: CheckpointInfo | None = None
    resuming: bool = False
    """Whether optimizer state and position also come from the checkpoint."""
    hf_model: str | None = None
    """The Hugging Face folder that the weights come from, if it is on this machine."""
    generation_config: dict = field(default_factory=dict)
    """generation_config.json of the Hugging Face model that the weights come from; checkpoints keep it."""
    elsewhere: bool = False
    """Whether the weights are not on this machine."""

    def sizes(self) -> tuple[dict | None, str]:
        """The architecture of the weights, and the place where it was read; None: only the settings give it."""
        if self.checkpoint is not None:
            return self.checkpoint.architecture, str(self.checkpoint.path)
        if self.hf_model is not None:
            return read_hf_architecture(self.hf_model), self.hf_model
        return None, "the flags"


def find_start(config: RunConfig, search: Search) -> Start:
    """The weights to start from.

    Raises:
        ConfigError: --load has no checkpoint of ours, or the one to resume is from another stage.
    """
    checkpoint, hf_model = config.checkpoint, config.model.hf_model
    what = "weights, their sizes and tokenizer"
    resumes = checkpoint.auto_resume and has_checkpoint(checkpoint.save)
    if checkpoint.auto_resume and not resumes:
        search.finds("--save", checkpoint.save, "whether there is a checkpoint to go on from")
    if resumes:
        return _of_checkpoint(config, read_info(checkpoint.save), resuming=True)
    if checkpoint.load is not None:
        if not search.finds("--load", checkpoint.load, what):
            return Start(elsewhere=True)
        resuming = spec_of(config).trains and not checkpoint.finetune
        return _of_checkpoint(config, read_info(checkpoint.load), resuming=resuming)
    if hf_model is not None and not search.finds("--hf-model", hf_model, what):
        return Start(elsewhere=True)
    return Start(hf_model=hf_model, generation_config=read_generation_config(hf_model) if hf_model else {})


def _of_checkpoint(config: RunConfig, info: CheckpointInfo, *, resuming: bool) -> Start:
    if config.checkpoint.verify:
        require_files(info)
    if resuming and info.stage != config.stage:
        raise ConfigError(
            f"{info.path} is of the {info.stage} stage and cannot be resumed by {config.stage}: "
            "add --finetune to start from its weights"
        )
    return Start(checkpoint=info, resuming=resuming, generation_config=info.generation_config)


@dataclass(frozen=True, kw_only=True)
class FrozenCheckpoint:
    """The checkpoint of a frozen model."""

    info: CheckpointInfo
    model: ResolvedModel
    """The model's sizes, with the run's other settings."""


def find_scoring_models(config: RunConfig, world_size: int, search: Search) -> dict[str, FrozenCheckpoint]:
    """The checkpoints of the models that the run scores with, by `ScoringModel.name`, where one is given.

    Raises:
        ConfigError: as `find_frozen`.
    """
    return {
        asked.name: find_frozen(config, asked.flag, asked.load, asked.head, world_size)
        for asked in spec_of(config).work(config).scoring
        if asked.load is not None
        and search.finds(asked.flag, asked.load, "weights; the estimate takes the policy's sizes")
    }


def find_frozen(config: RunConfig, flag: str, directory: str, head: Head, world_size: int) -> FrozenCheckpoint:
    """The checkpoint that a flag such as --prior-load names, for a run whose sizes are resolved.

    Raises:
        ConfigError: there is none, it holds another kind of model or has another vocabulary, or the run's layout does
            not fit it.
    """
    info = read_info(directory)
    if info.head != head:
        raise ConfigError(f"{flag}: {info.path} holds a {info.head} model, a {head} model is needed here")
    without_sizes = ModelConfig(**{**vars(config.model), **dict.fromkeys(ARCHITECTURE_FIELDS)})
    model = resolve(without_sizes, info.architecture, str(info.path))
    if model.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{info.path} has vocab_size={model.vocab_size}, the policy has {config.model.vocab_size}: "
            "all models of a run share one tokenizer"
        )
    validate_layout(dataclasses.replace(config, model=model), world_size, model)
    return FrozenCheckpoint(info=info, model=model)
