"""Boxes to and from a folder, by torch.distributed.checkpoint."""

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
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

from megatron_brain.checkpointing.boxes import Box
from megatron_brain.config.errors import ConfigError

_METADATA = ".metadata"


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


def read_boxes(boxes: Sequence[Box], folder: Path) -> None:
    """Fill the boxes, whatever boxes they were written in. All ranks call it.

    Raises:
        ConfigError: the checkpoint lacks a tensor, has it in another shape, or its list of tensors is not one.
        CheckpointError: its files cannot be read.
    """
    wanted = _by_key(boxes)
    stored = read_metadata(folder).state_dict_metadata
    missing = sorted(key for key in wanted if key not in stored)
    if missing:
        raise ConfigError(f"{folder} has no {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    for key, found in wanted.items():
        if tuple(stored[key].size) != found[0].shape:
            raise ConfigError(f"{folder}: {key} has shape {tuple(stored[key].size)}, needed is {found[0].shape}")
    try:
        dcp.load(wanted, storage_reader=_Reader(folder), planner=_LoadPlanner())
    except CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read: {_failures(error)}") from error


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors whose names start with `prefix`, whole, on this process alone."""
    boxes = []
    for key, stored in read_metadata(folder).state_dict_metadata.items():
        if key.startswith(prefix):
            data = torch.empty(stored.size, dtype=stored.properties.dtype)
            boxes.append(Box(key=key, shape=tuple(stored.size), offset=(0,) * data.dim(), data=data))
    reader, planner = _Reader(folder), _LoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner(_by_key(boxes), metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return {box.key: box.data for box in boxes}


def read_metadata(folder: Path) -> Metadata:
    """What tensors a folder holds and where, read without executing anything the file may ask for.

    Raises:
        ConfigError: the file holds something else.
    """
    path = folder / _METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no {_METADATA}: it is not a checkpoint of this version") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(f"{path} is not a list of tensors, nothing of it was loaded: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path} holds a {type(metadata).__name__}, not a list of tensors")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the plain records of torch.distributed.checkpoint's metadata and nothing else."""

    _NAMES = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


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
    def storage_meta(self) -> StorageMeta | None:
        """Nothing: by default the folder's name, which is another once the checkpoint is complete."""
        return None


class _Reader(dcp.FileSystemReader):
    def read_metadata(self) -> Metadata:
        """As by default, but not with pickle's leave to call anything."""
        return read_metadata(self.path)
