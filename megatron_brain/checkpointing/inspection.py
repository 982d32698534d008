"""Describes a checkpoint in words, and finds out whether it is still what was saved. It needs no process group."""

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import yaml

from megatron_brain.checkpointing.checksums import json_checksum
from megatron_brain.checkpointing.data_files import by_file, opened, stored_name
from megatron_brain.checkpointing.errors import COPY, DamagedError
from megatron_brain.checkpointing.folders import INFO, CheckpointInfo, require_files
from megatron_brain.checkpointing.index import Index, StoredBox, read_index
from megatron_brain.checkpointing.state import NOT_WEIGHTS
from megatron_brain.checkpointing.verification import find_damaged_boxes
from megatron_brain.config.fields import stage_fields

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_HIDDEN_STATE = ("data",)
"""The entries of a stage's state that are not numbers for a reader."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of comparing a checkpoint with its checksums."""

    boxes: int
    nbytes: int
    seconds: float
    unverified: int = 0
    """Boxes without a checksum."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(["DAMAGED:", *(f"  {problem}" for problem in self.problems)])
        if self.unverified == self.boxes:
            return "not verified: it is of an earlier version, which made no checksums"
        speed = self.nbytes / max(self.seconds, 1e-9) / 1e9
        return (
            f"sound: {self.boxes - self.unverified:,} pieces of tensors, {self.nbytes / 1e9:.3f} GB, and small files "
            f"are what was saved ({self.seconds:.1f} s, {speed:.1f} GB/s)"
        )


def describe(info: CheckpointInfo, *, all_tensors: bool = False) -> str:
    """Several lines about a checkpoint: what it is, the position of its run, its settings and its tensors.

    Raises:
        DamagedError: its list of tensors, or what it says about its run, is damaged.
        ConfigError: its stage is unknown.
    """
    index = read_index(info.path)
    try:
        position = list(_position(info))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(f"{info.path / INFO} is damaged: what it says of its run lacks {error}. {COPY}") from error
    return "\n".join(
        [
            *_identity(info),
            "",
            "position",
            *(f"  {line}" for line in position),
            "",
            "configuration (config.yaml), as far as it is not the default",
            *(f"  {line}" for line in _settings(info)),
            "",
            *_tensors(index, all_tensors=all_tensors),
        ]
    )


def examine(info: CheckpointInfo, *, finite: bool = False) -> Examination:
    """Compare all contents of a checkpoint with their checksums.

    Args:
        finite: also look for values that are not finite.

    Raises:
        DamagedError, CheckpointError: a file cannot be read.
    """
    started = time.perf_counter()
    index = read_index(info.path)
    boxes = [box for stored in index.boxes.values() for box in stored]
    problems = []
    try:
        require_files(info)
    except DamagedError as error:
        problems.append(str(error))
    problems += [f"{name}: not what was saved" for name in find_damaged_boxes(boxes, info.path)]
    if finite:
        problems += [f"{name}: {count:,} values are not finite" for name, count in _not_finite(index, boxes)]
    return Examination(
        boxes=len(boxes),
        nbytes=sum(box.part.nbytes for box in boxes),
        seconds=time.perf_counter() - started,
        unverified=sum(box.checksum is None for box in boxes),
        problems=problems,
    )


def _identity(info: CheckpointInfo) -> Iterator[str]:
    sizes = ", ".join(f"{name}={value}" for name, value in info.architecture.items() if value not in (None, False))
    layout = " x ".join(f"{name} {size}" for name, size in info.layout.items())
    yield f"{info.path.resolve()}"
    yield f"  {info.head} model of the {info.stage} stage, iteration {info.iteration}, format {info.format}"
    yield f"  saved at {layout}, in {'bf16' if info.bf16 else 'float32'}; it loads at any layout"
    yield f"  optimizer: {'there, the run can be resumed' if info.has_optimizer else 'not there, weights only'}"
    date = f", date in its chat template {info.template_date}" if info.template_date else ""
    yield f"  tokenizer: {info.tokenizer_type}{date}"
    yield f"  architecture: {sizes}"


def _position(info: CheckpointInfo) -> Iterator[str]:
    state = {name: value for name, value in info.stage_state.items() if name not in _HIDDEN_STATE}
    yield ", ".join(f"{name} {value}" for name, value in state.items()) or "none: it was converted, not trained"
    if samples := state.get("num_samples"):
        taken = info.iteration * state["global_batch_size"]
        yield f"{taken:,} samples taken: {taken / samples:.2f} passes over {samples:,}"
    for flag, contents in info.stage_state.get("data", {}).items():
        yield f"--{flag.replace('_', '-')}: {contents['count']:,} records, fingerprint {json_checksum(contents)}"
    if "scheduler" in info.trainer_state:
        steps = info.trainer_state["optimizer_steps"]
        yield f"optimizer steps {steps}, learning-rate schedule at {info.trainer_state['scheduler'].get('num_steps')}"


def _settings(info: CheckpointInfo) -> Iterator[str]:
    path = info.path / "config.yaml"
    try:
        values = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        yield f"{path} cannot be read: {error}"
        return
    fields = stage_fields(info.stage)
    for name, value in values.items():
        if name in fields and name not in info.architecture and value != fields[name].default:
            yield f"{name}: {value}"


def _tensors(index: Index, *, all_tensors: bool) -> Iterator[str]:
    """A line of sums, then a line for each tensor, or for each kind of tensor that every layer has one of."""
    kinds: dict[tuple[str, tuple[int, ...], torch.dtype], list[str]] = defaultdict(list)
    elements: Counter[str] = Counter()
    for key in sorted(index.boxes, key=lambda key: (key.startswith(NOT_WEIGHTS), _in_order(key))):
        kind = key if all_tensors else _LAYER.sub("*", key)
        part = index.boxes[key][0].part
        kinds[kind, part.shape, part.dtype].append(key)
        elements[_part_of(key)] += math.prod(part.shape)
    files = {box.file: box.file_size for boxes in index.boxes.values() for box in boxes}
    sums = ", ".join(f"{name} {count:,}" for name, count in elements.items())
    yield f"tensors: {len(index.boxes):,} in {len(files):,} files of {sum(files.values()) / 1e9:.3f} GB; values: {sums}"
    for (kind, shape, dtype), keys in kinds.items():
        many = f"  x {len(keys)}" if len(keys) > 1 else ""
        yield f"  {kind}  {list(shape)}  {str(dtype).removeprefix('torch.')}{many}"


def _in_order(key: str) -> list[tuple[int, str]]:
    """Sort key of a tensor's name: layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _part_of(key: str) -> str:
    return next((prefix.removesuffix(".") for prefix in NOT_WEIGHTS if key.startswith(prefix)), "weights")


def _not_finite(index: Index, boxes: list[StoredBox]) -> Iterator[tuple[str, int]]:
    for file, batch in by_file((box for box in boxes if box.part.dtype.is_floating_point), of=lambda box: box):
        with opened(index.folder / file) as data:
            values = ((box, data.get_tensor(stored_name(box.part))) for box in batch)
            counts = [(box, int((~torch.isfinite(tensor.float())).sum())) for box, tensor in values]
        yield from ((f"{stored_name(box.part)} in {file}", count) for box, count in counts if count)
