"""One resolved run: everything that is decided before processes connect, for a start and a dry run alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_brain.checkpointing.locate_tokenizer import locate_tokenizer
from megatron_brain.config.checks import data_parallel_size, validate_layout
from megatron_brain.config.run import RunConfig
from megatron_brain.data.reading_settings import ReadingSettings
from megatron_brain.data.tokenizer import Tokenizer, check_fits
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import REQUIRED_SIZES, resolve
from megatron_brain.models.provider import Layers, choose_layers
from megatron_brain.startup.disk import Search, Start, find_start


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run that can be started. Nothing in it is decided again later."""

    config: RunConfig
    """The settings, with the model's sizes known, the layout checked and the tokenizer's kind decided."""
    world_size: int
    start: Start
    tokenizer: Tokenizer | None
    """The loaded tokenizer; None: a dry run without it."""
    layers: Layers | None
    """The implementation of the layers; None: a dry run, which looks at no device."""

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas of the model."""
        return data_parallel_size(self.config, self.world_size)


def resolve_run(
    config: RunConfig, world_size: int, *, device: Callable[[], torch.device] | None, search: Search | None = None
) -> ResolvedRun:
    """Decide everything about a run that can be decided before processes connect.

    Args:
        config: the run's settings.
        world_size: number of processes.
        device: returns this process's device and is called last; None: no device is looked at.
        search: notes what is on this machine; None: everything has to be there.

    Raises:
        ConfigError: the user asked for something that is impossible.
    """
    search = search or Search()
    start = find_start(config, search)
    config = _with_sizes(config, start, world_size, search)
    config, tokenizer = _with_tokenizer(config, start, search)
    layers = None if device is None else choose_layers(config.model, config.parallel, config.fp8, device())
    return ResolvedRun(
        config=config,
        world_size=world_size,
        start=start,
        tokenizer=tokenizer,
        layers=layers,
    )


def _with_sizes(config: RunConfig, start: Start, world_size: int, search: Search) -> RunConfig:
    """The settings with the model's sizes known and the layout checked."""
    missing = [name for name in REQUIRED_SIZES if getattr(config.model, name) is None]
    if start.elsewhere and missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(
            f"{search.absent[-1].partition(': ')[0]} is not on this machine and the model's sizes are not in the "
            f"configuration: add {flags} (a start compares them with the weights), or make the dry run where the "
            "weights are"
        )
    found, source = start.sizes()
    model = resolve(config.model, found, source)
    config = dataclasses.replace(config, model=model)
    validate_layout(config, world_size, model)
    return config


def _with_tokenizer(config: RunConfig, start: Start, search: Search) -> tuple[RunConfig, Tokenizer | None]:
    """The settings with the tokenizer's kind decided, and the tokenizer if it is on this machine.

    Raises:
        ConfigError: the tokenizer cannot be read, or the model's vocabulary is too small for it.
    """
    place = config.tokenizer.tokenizer_model
    if place is None and start.elsewhere:
        return config, None
    if place is not None and not search.finds("--tokenizer-model", place, "whether the vocabulary holds its ids"):
        return config, None
    kind, place = locate_tokenizer(config.tokenizer, start.checkpoint, config.model.hf_model)
    # The settings keep a place only if the user gave it: the checkpoint that holds another one may be removed.
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, tokenizer_type=kind))
    tokenizer = ReadingSettings.of(config, kind, place).open_tokenizer()
    check_fits(tokenizer, config.model.vocab_size)
    return config, tokenizer
