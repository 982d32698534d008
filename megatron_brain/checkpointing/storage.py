"""Boxes to and from a folder, by torch.distributed.checkpoint.

Which tensors are there and where, we read from an index of our own, tensors.json; torch's list of the same is a pickle,
written for torch's tools and never read here.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_brain.checkpointing.boxes import Box
from megatron_brain.config.errors import ConfigError
from megatron_brain.files import write_whole

INDEX = "tensors.json"
_SUFFIX = ".distcp"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read on some rank; raised on all of them."""


def write_boxes(boxes: Sequence[Box], folder: Path, group: dist.ProcessGroup) -> None:
    """Write all ranks' boxes, whose union is whole tensors, and sync the files. Boxes two ranks have are written once.

    Raises:
        CheckpointError: a rank could not write.
    """
    try:
        dcp.save(_by_key(boxes), storage_writer=_Writer(folder), planner=_SavePlanner(), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(_failures(error)) from error


def read_boxes(boxes: Sequence[Box], folder: Path, *, if_alike: Sequence[Box] = ()) -> bool:
    """Fill the boxes, whatever boxes they were written in. All ranks call it.

    Args:
        if_alike: boxes to fill too if the checkpoint has tensors of all their names and shapes.

    Returns:
        whether those were filled.

    Raises:
        ConfigError: on all ranks, where one finds that the checkpoint lacks a tensor or has it in another shape, or
            that it is damaged.
        CheckpointError: on all ranks, where its files cannot be read, or ranks read different folders.
    """
    wanted, index, problem, alike = _by_key(boxes), None, None, False
    try:
        index = read_index(folder)
        alike = all(index.shape(box.key) == box.shape for box in if_alike)
        wanted |= _by_key(if_alike) if alike else {}
        _check_wanted(wanted, index)
    except ConfigError as error:
        problem = str(error)
    # A rank that finds something wrong must not leave the others waiting for it.
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, (folder.name, problem))
    for _, problem in told:
        if problem is not None:
            raise ConfigError(problem)
    names = sorted({name for name, _ in told})
    if len(names) > 1:
        raise CheckpointError(
            f"ranks found different checkpoints in {folder.parent}: {', '.join(names)}. Is another job writing there? "
            "Name one iter_ folder"
        )
    try:
        dcp.load(wanted, storage_reader=_Reader(index), planner=_LoadPlanner())
    except CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read: {_failures(error)}") from error
    return alike


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors whose names start with `prefix`, whole, on this process alone."""
    index = read_index(folder)
    boxes = []
    for key, stored in index.metadata.state_dict_metadata.items():
        if key.startswith(prefix):
            data = torch.empty(stored.size, dtype=stored.properties.dtype)
            boxes.append(Box(key=key, shape=tuple(stored.size), offset=(0,) * data.dim(), data=data))
    reader, planner = _Reader(index), _LoadPlanner()
    planner.set_up_planner(_by_key(boxes), index.metadata)
    reader.set_up_storage_reader(index.metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return {box.key: box.data for box in boxes}


@dataclass(frozen=True)
class Index:
    """What tensors a folder holds and where."""

    folder: Path
    metadata: Metadata

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None where it is not there."""
        stored = self.metadata.state_dict_metadata.get(key)
        return None if stored is None else tuple(stored.size)


def read_index(folder: Path) -> Index:
    """Read and check the list of tensors: every tensor is covered, every file is there and long enough.

    Raises:
        ConfigError: it is not so.
    """
    path = folder / INDEX
    try:
        tensors = json.loads(path.read_text(encoding="utf-8"))
        lengths = {file.name: file.stat().st_size for file in folder.glob(f"*{_SUFFIX}")}
        stored, places = {}, {}
        for key, tensor in tensors.items():
            stored[key] = _tensor_metadata(key, tensor)
            for box in tensor["boxes"]:
                places[MetadataIndex(key, tuple(box["offset"]))] = _place(key, box, lengths)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no {INDEX}: it is not a checkpoint of this version") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: the checkpoint is damaged or not complete: {error}") from error
    return Index(folder, Metadata(state_dict_metadata=stored, storage_data=places))


def _tensor_metadata(key: str, tensor: dict) -> TensorStorageMetadata:
    shape = torch.Size(tensor["shape"])
    chunks = [ChunkStorageMetadata(torch.Size(box["offset"]), torch.Size(box["size"])) for box in tensor["boxes"]]
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(shape)
        and all(o >= 0 and n > 0 and o + n <= whole for o, n, whole in zip(chunk.offsets, chunk.sizes, shape))
        for chunk in chunks
    )
    if not inside or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{key} is not there in full")
    dtype = getattr(torch, tensor["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{key} has the dtype {tensor['dtype']!r}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)


def _place(key: str, box: dict, lengths: dict[str, int]) -> _StorageInfo:
    name, start, length = box["file"], int(box["start"]), int(box["length"])
    if name not in lengths:
        raise ValueError(f"{name}, which holds a part of {key}, is not there; do all nodes see this folder?")
    if start < 0 or length < 0 or start + length > lengths[name]:
        raise ValueError(f"{name} ends before a part of {key}")
    return _StorageInfo(name, start, length)


def _check_wanted(wanted: dict[str, list[Box]], index: Index) -> None:
    missing = sorted(key for key in wanted if index.shape(key) is None)
    if missing:
        raise ConfigError(f"{index.folder} has no {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    for key, boxes in wanted.items():
        if index.shape(key) != boxes[0].shape:
            raise ConfigError(f"{index.folder}: {key} has shape {index.shape(key)}, needed is {boxes[0].shape}")


def _failures(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {_in_words(e)}" for rank, (e, _) in sorted(error.failures.items()))


def _in_words(error: BaseException) -> str:
    # What torch.save makes of a write that the file system refuses.
    refused = " (a write was refused: is the disk full?)" if "inline_container" in str(error) else ""
    return f"{type(error).__name__}: {error}{refused}"


def _by_key(boxes: Iterable[Box]) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    for box in boxes:
        found.setdefault(box.key, []).append(box)
    return found


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=box.data.size())


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans boxes; which of several ranks writes a box they all have is the default's choice."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self._boxes = {(box.key, box.offset): box for boxes in self.state_dict.values() for box in boxes}
        items = [
            WriteItem(
                index=MetadataIndex(box.key, box.offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box),
                    properties=TensorProperties(dtype=box.data.dtype),
                    size=torch.Size(box.shape),
                ),
            )
            for box in self._boxes.values()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index.fqn, tuple(index.offset)].data


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Plans what to read for boxes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self._boxes = {(box.key, box.offset): box for boxes in state_dict.values() for box in boxes}

    def create_local_plan(self) -> LoadPlan:
        stored = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for key, boxes in self.state_dict.items():
            items += create_read_items_for_chunk_list(key, stored[key], [_chunk(box) for box in boxes])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index.fqn, tuple(index.offset)].data


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        # No copies ahead: boxes are on the host already, or few enough to wait for.
        super().__init__(folder, per_thread_copy_ahead=0)
        self._folder = folder

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """As by default, and our index."""
        super().finish(metadata, results)
        tensors: dict[str, dict] = {
            key: {"dtype": str(stored.properties.dtype).removeprefix("torch."), "shape": list(stored.size), "boxes": []}
            for key, stored in metadata.state_dict_metadata.items()
        }
        sizes = {
            (key, tuple(chunk.offsets)): list(chunk.sizes)
            for key, stored in metadata.state_dict_metadata.items()
            for chunk in stored.chunks
        }
        for result in (result for of_rank in results for result in of_rank):
            key, offset, place = result.index.fqn, tuple(result.index.offset), result.storage_data
            tensors[key]["boxes"].append(
                {
                    **{"offset": list(offset), "size": sizes[key, offset]},
                    **{"file": place.relative_path, "start": place.offset, "length": place.length},
                }
            )
        write_whole(self._folder / INDEX, json.dumps(tensors))


class _Reader(dcp.FileSystemReader):
    def __init__(self, index: Index) -> None:
        super().__init__(index.folder)
        self._index = index

    def read_metadata(self) -> Metadata:
        """The index, not the pickle that is read by default."""
        return self._index.metadata
