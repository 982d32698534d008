"""Boxes to and from a folder: safetensors files of boxes, and an index of which is where."""

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_brain.checkpointing.boxes import Box, BoxPart, divide
from megatron_brain.checkpointing.checksums import checksum
from megatron_brain.checkpointing.data_files import by_file, opened, stored_name
from megatron_brain.checkpointing.errors import COPY, CheckpointError, DamagedError
from megatron_brain.checkpointing.index import INDEX, Index, StoredBox, read_index, write_index
from megatron_brain.checkpointing.verification import host_and_parts, my_share, require_sound
from megatron_brain.errors import AgreedError, ConfigError

log = logging.getLogger(__name__)


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and sync it. The interpreter is free for other threads meanwhile.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    # safetensors writes a file that its user alone may read and gives it this name.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise SafetensorError(f"{path}: {error}") from error
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_file(boxes: Sequence[Box], path: Path) -> list[StoredBox]:
    """Write boxes into one safetensors file and sync it, on this process alone; of no boxes, no file.

    Boxes may be views of one another's memory where they do not overlap. What is not contiguous, or on a device, is
    copied to the host first.

    Returns:
        What `write_index` needs to know.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    if not boxes:
        return []
    values = [box.data.detach().cpu().contiguous() for box in boxes]
    with ThreadPoolExecutor(1) as beside:
        # While the disk works.
        checksums = beside.submit(lambda: list(map(checksum, values)))
        write_safetensors({stored_name(box.part): data for box, data in zip(boxes, values, strict=True)}, path)
    size = path.stat().st_size
    return [
        StoredBox(part=box.part, file=path.name, file_size=size, checksum=found)
        for box, found in zip(boxes, checksums.result(), strict=True)
    ]


def write_boxes(boxes: Sequence[Box], folder: Path, group: dist.ProcessGroup) -> None:
    """Write all ranks' boxes, whose union is whole tensors, a file a rank, and the index; all is synced.

    Boxes that several ranks have are written once, by ranks chosen so that all write about equally many bytes. All
    ranks of the group call it.

    Raises:
        CheckpointError: on all ranks, where one could not write.
    """
    rank = dist.get_rank(group)
    own = {box.part: box for box in boxes if box.data.numel() or 0 in box.shape}
    assigned = divide(_gather(list(own), group))
    stored, failed = [], None
    try:
        stored = write_file([own[part] for part in assigned[rank]], folder / f"weights_{rank:05d}.safetensors")
    except Exception as error:
        failed = error
    told = _gather((stored, _in_words(failed)), group)
    _raise_failures([words for _, words in told], failed)
    if rank == 0:
        try:
            write_index(folder, itertools.chain.from_iterable(stored for stored, _ in told))
        except Exception as error:
            failed = error
    _raise_failures(_gather(_in_words(failed), group), failed)


def fill(boxes: Sequence[Box], index: Index) -> None:
    """Fill boxes of any tensors, whatever boxes they were written in, on this process alone.

    Only what is needed is read, and at most 256 MiB of a file, or one of its boxes, is in memory besides the boxes.

    Raises:
        ConfigError: a tensor is not there or has another shape, or a file is damaged.
        CheckpointError: the disk does not give a file.
    """
    _check_wanted(boxes, index)
    overlaps = [
        (stored, box) for box in boxes for stored in index.boxes[box.key] if _overlap(stored.part, box.part) is not None
    ]
    for file, batch in by_file(overlaps, of=lambda pair: pair[0]):
        with opened(index.folder / file) as data:
            for stored, box in batch:
                _copy(data, stored.part, box)


def read_part(part: BoxPart, index: Index) -> Tensor:
    """The values of a part of a tensor, on this process alone.

    Where a file holds this very part in this dtype, they are not copied: their memory is the file's, and must not be
    written to.

    Raises:
        ConfigError, CheckpointError: as `fill` does.
    """
    for stored in index.boxes.get(part.key, ()):
        if stored.part == part:
            with opened(index.folder / stored.file) as data:
                values: Tensor = data.get_tensor(stored_name(part))
                _check_stored(part, values.dtype, tuple(values.shape))
            return values
    values = torch.empty(part.size, dtype=part.dtype)
    fill([Box(key=part.key, shape=part.shape, offset=part.offset, data=values)], index)
    return values


def read_boxes(
    boxes: Sequence[Box], folder: Path, *, if_alike: Sequence[Sequence[Box]] = (), verify: bool = True
) -> list[bool]:
    """Fill the boxes, whatever boxes they were written in. All ranks call it.

    Args:
        if_alike: sets of boxes, each to be filled too if the checkpoint has tensors of all its names and shapes.
        verify: compare what is read with its checksums.

    Returns:
        Which of those were filled.

    Raises:
        ConfigError: on all ranks, where one finds that the checkpoint lacks a tensor or has it in another shape, or
            that it is damaged.
        CheckpointError: on all ranks, where the disk does not give its files, or ranks read different folders.
    """
    wanted, index, problem, alike = list(boxes), None, None, []
    try:
        index = read_index(folder)
        alike = [all(index.shape(box.key) == box.shape for box in some) for some in if_alike]
        wanted += [box for some in itertools.compress(if_alike, alike) for box in some]
        _check_wanted(wanted, index)
    except ConfigError as error:
        problem = str(error)
    # A rank that finds something wrong must not leave the others waiting for it.
    told = _gather((folder.name, problem))
    for _, problem in told:
        if problem is not None:
            raise AgreedError(problem)
    names = sorted({name for name, _ in told})
    if len(names) > 1:
        raise CheckpointError(
            f"ranks found different checkpoints in {folder.parent}: {', '.join(names)}. Is another job writing there? "
            "Name one iter_ folder"
        )
    assert index is not None
    needed = _needed(wanted, index)
    if verify and index.has_checksums:
        needed = my_share(needed, _gather(host_and_parts(needed)), dist.get_rank())
        _on_all(lambda: require_sound(needed, folder))
    elif verify and dist.get_rank() == 0:
        log.info("%s has no checksums, being of an earlier version: what is read is not verified", folder)
    _on_all(lambda: fill(wanted, index))
    return alike


def _needed(boxes: Sequence[Box], index: Index) -> list[StoredBox]:
    """The stored boxes that have a part of these."""
    stored = {
        found.part: found
        for box in boxes
        for found in index.boxes[box.key]
        if _overlap(found.part, box.part) is not None
    }
    return list(stored.values())


def _on_all(action: Callable[[], None]) -> None:
    """Do something, then raise on all ranks what failed on any: what is damaged as ConfigError."""
    failed = None
    try:
        action()
    except Exception as error:
        failed = error
    told = _gather((_in_words(failed), isinstance(failed, ConfigError)))
    failures = [(rank, words, damage) for rank, (words, damage) in enumerate(told) if words is not None]
    if failures and all(damage for *_, damage in failures):
        by = {words: rank for rank, words, _ in reversed(failures)}
        raise AgreedError(
            "; ".join(f"{words} (found by rank {rank})" if len(told) > 1 else words for words, rank in by.items())
        )
    _raise_failures([words for words, _ in told], failed)


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors whose names start with `prefix`, whole, on this process alone."""
    index = read_index(folder)
    parts = {key: boxes[0].part for key, boxes in index.boxes.items() if key.startswith(prefix)}
    found = {key: torch.empty(part.shape, dtype=part.dtype) for key, part in parts.items()}
    fill([Box(key=key, shape=data.shape, offset=(0,) * data.dim(), data=data) for key, data in found.items()], index)
    return found


def _gather(item: object, group: dist.ProcessGroup | None = None) -> list[Any]:
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def _in_words(error: Exception | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, (CheckpointError, ConfigError)) else f"{type(error).__name__}: {error}"


def _raise_failures(errors: Sequence[str | None], cause: Exception | None) -> None:
    """Raise what failed on any rank, with the traceback of what failed on this one."""
    found = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
    if found:
        raise CheckpointError("; ".join(found)) from cause


def _check_wanted(boxes: Sequence[Box], index: Index) -> None:
    missing = sorted({box.key for box in boxes if index.shape(box.key) is None})
    if missing:
        found = f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
        raise DamagedError(f"{index.folder} has no {found}. {COPY}")
    for box in boxes:
        if index.shape(box.key) != box.shape:
            raise DamagedError(
                f"{index.folder}: {box.key} has shape {index.shape(box.key)}, needed is {box.shape}. {COPY}"
            )


def _overlap(one: BoxPart, other: BoxPart) -> list[tuple[int, int]] | None:
    """Elements [start, end) of the whole tensor, in each dimension, that both have; None if there are none."""
    starts = map(max, one.offset, other.offset)
    ends = map(min, one.end, other.end)
    both = list(zip(starts, ends, strict=True))
    return both if all(start < end for start, end in both) else None


@torch.no_grad()
def _copy(data: safe_open, part: BoxPart, box: Box) -> None:
    """Copy what a stored part has of a box; of the file, only that is read."""
    name, both = stored_name(part), _overlap(part, box.part)
    assert both is not None
    values = data.get_slice(name)
    shape = tuple(values.get_shape())
    # A tensor without dimensions cannot be sliced.
    values = values[_within(both, part.offset)] if both else data.get_tensor(name)
    _check_stored(part, values.dtype, shape)
    box.data[_within(both, box.offset)].copy_(values)


def _check_stored(part: BoxPart, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (dtype, shape) != (part.dtype, part.size):
        raise SafetensorError(f"{stored_name(part)} is {dtype} {shape} there, and {part.dtype} {part.size} in {INDEX}")


def _within(ranges: Sequence[tuple[int, int]], offset: Sequence[int]) -> tuple[slice, ...]:
    """Ranges of a whole tensor as slices of a box of it."""
    return tuple(slice(start - first, end - first) for (start, end), first in zip(ranges, offset, strict=True))
