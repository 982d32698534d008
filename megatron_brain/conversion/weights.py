"""Weights between model chunks and a Hugging Face directory."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.state import model_boxes, zero_vocabulary_padding
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.family import Family, Weight
from megatron_brain.conversion.registry import HFModel, read_hf_model
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.errors import ConfigError
from megatron_brain.models.provider import Chunk

log = logging.getLogger(__name__)


@torch.no_grad()
def load_hf_weights(directory: str | Path, chunks: Sequence[Chunk], model: ModelConfig, head: Head) -> None:
    """Fill this rank's chunks, of any layout, from a Hugging Face directory. One whole tensor is in memory at a time.

    Vocabulary padding becomes zeros. If a reward model starts from a language model, its head stays as it was.

    Args:
        directory: one that holds config.json and safetensors files.
        chunks: those that `build_model` made for `model` and `head`.

    Raises:
        ConfigError: `head` is a policy but the directory a classifier, or tensors are missing, unknown or misshapen.
    """
    source = read_hf_model(directory)
    if head == "policy" and source.head == "reward":
        raise ConfigError(
            f"{directory} is a reward model ({source.family.reward_class}) and has no output layer; a policy is needed "
            f"here: give a {source.family.policy_class}"
        )
    table = {weight.key(layer): (weight, layer) for weight, layer in source.family.entries(model, source.head)}
    files = SafetensorsReader(source.directory)
    names = check_tensors(files, source, model)
    key, whole = None, None
    for box in model_boxes(chunks):
        if box.key == source.family.reward_head.key(None) and source.head == "policy":
            log.info("%s is a language model: the reward head starts from its random weights", directory)
            continue
        if key != box.key:
            # The tensor before is dropped first, so that there is never more than one.
            key, whole = box.key, None
            whole = _read(files, names, *table[key], model)
        box.data.copy_(whole[_place(box)])
    zero_vocabulary_padding(chunks)


def hf_tensors(chunk: Chunk, model: ModelConfig, head: Head, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every tensor of the Hugging Face model, from a chunk that holds the whole model."""
    held: dict[str, list[Box]] = {}
    for box in model_boxes([chunk]):
        held.setdefault(box.key, []).append(box)
    for weight, layer in family.entries(model, head):
        whole = _assemble(held[weight.key(layer)])
        for source, tensor in zip(weight.sources, weight.fusion.split(whole, model), strict=True):
            yield source.in_layer(layer), tensor


def check_tensors(files: SafetensorsReader, source: HFModel, model: ModelConfig) -> dict[str, str]:
    """Check that the files hold exactly the tensors of the table, in their shapes.

    This reads headers only, and an output layer that a tied model repeats.

    Args:
        files: of the directory of `source`.
        model: sizes of `source`, resolved.

    Returns:
        The name in the files of every tensor of the table. Files of a base model lack the prefix.

    Raises:
        ConfigError: tensors are missing, unknown or misshapen, or a repeated output layer differs.
    """
    where, family = source.directory, source.family
    lacking = "" if any(name.startswith(family.prefix) for name in files.file_of) else family.prefix
    shapes = dict(family.tensors(model, source.head))
    names = {name: name.removeprefix(lacking) for name in shapes}
    missing = [name for name in names.values() if name not in files.file_of]
    if missing:
        raise ConfigError(
            f"{where} lacks {len(missing)} of the {len(names)} tensors of its model: {_some(missing)}; fetch its files "
            "again, or correct config.json"
        )
    known = set(names.values())
    unknown = [name for name in files.file_of if name not in known and not name.endswith(family.ignored)]
    output = family.output.sources[0].name
    if output in unknown and source.head == "policy":
        # The model is tied: the table of an untied one has this tensor. Some indexes list it, but no file has it.
        if not files.lacks(output):
            _check_tied_output(files, where, output, names[family.embedding[0].sources[0].name])
        unknown.remove(output)
    if unknown:
        raise ConfigError(
            f"{where} has {len(unknown)} tensors that a {family.name} model of its config.json does not have: "
            f"{_some(unknown)}; fetch its files again, or correct config.json"
        )
    for name, shape in shapes.items():
        _check_shape(files, names[name], shape)
    return names


def _check_shape(files: SafetensorsReader, name: str, expected: tuple[int, ...]) -> None:
    found = files.shape(name)
    if found != expected:
        raise ConfigError(
            f"{files.directory / files.file_of[name]}: {name} has shape {list(found)}, "
            f"the sizes in config.json ask for {list(expected)}: correct the one that is wrong"
        )


def _check_tied_output(files: SafetensorsReader, where: Path, output: str, embedding: str) -> None:
    """Some files repeat the embedding as the output layer. If the two differ, transformers unties them."""
    if not torch.equal(files.read(output), files.read(embedding)):
        raise ConfigError(
            f"{where}: config.json has tie_word_embeddings=true, but {output} differs from {embedding}: "
            "set tie_word_embeddings to false, or remove the tensor"
        )


def _read(
    files: SafetensorsReader, names: dict[str, str], weight: Weight, layer: int | None, model: ModelConfig
) -> Tensor:
    """A whole weight of a checkpoint, made of the tensors in the files.

    Raises:
        ConfigError: one of them holds NaN or infinity.
    """
    parts = []
    for name in (names[source.in_layer(layer)] for source in weight.sources):
        parts.append(files.read(name))
        if not all(bound.isfinite() for bound in parts[-1].aminmax()):
            raise ConfigError(
                f"{files.directory / files.file_of[name]}: {name} holds values that are not finite: fetch it again"
            )
    return weight.fusion.join(parts, model)


def _place(box: Box) -> tuple[slice, ...]:
    """The part of the whole tensor that a box covers."""
    return tuple(slice(start, start + size) for start, size in zip(box.offset, box.data.shape, strict=True))


def _assemble(held: list[Box]) -> Tensor:
    if len(held) == 1:
        return held[0].data
    whole = held[0].data.new_empty(held[0].shape)
    for box in held:
        whole[_place(box)] = box.data
    return whole


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
