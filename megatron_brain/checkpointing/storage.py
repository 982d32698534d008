"""Writes boxes to a folder and reads them: safetensors files hold the boxes, an index says where each is."""

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
    """Write a safetensors file and sync it. Other threads can run Python meanwhile.

    Raises:
        OSError, SafetensorError: the file could not be written.
    """
    # safetensors puts a new file, which only its user may read, in place of this one: the mode is set again below.
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
    """Write boxes into one safetensors file and sync it, in this process alone. Without boxes it makes no file.

    Boxes may be views of the same memory if they do not overlap. Boxes that are not contiguous, or on a device, are
    copied to the host first.

    Returns:
        The input of `write_index`.

    Raises:
        OSError, SafetensorError: the file could not be written.
    """
    if not boxes:
        return []
    values = [box.data.detach().cpu().contiguous() for box in boxes]
    with ThreadPoolExecutor(1) as beside:
        # The checksums are computed while the disk works.
        checksums = beside.submit(lambda: list(map(checksum, values)))
        write_safetensors({stored_name(box.part): data for box, data in zip(boxes, values, strict=True)}, path)
    size = path.stat().st_size
    return [
        StoredBox(part=box.part, file=path.name, file_size=size, checksum=found)
        for box, found in zip(boxes, checksums.result(), strict=True)
    ]


def write_boxes(boxes: Sequence[Box], folder: Path, group: dist.ProcessGroup) -> None:
    """Write the boxes of all ranks, which together are whole tensors: one file for each rank, and the index. Sync them.

    A box that several ranks have is written once; all ranks write about equally many bytes. All ranks of the group call
    this.

    Raises:
        CheckpointError: some rank could not write; raised on all ranks.
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
    """Fill boxes of any tensors, in whatever boxes they were written, in this process alone.

    It reads only what is needed. Besides the boxes, at most 256 MiB of a file, or one of its boxes, is in memory.

    Raises:
        ConfigError: a tensor is missing or has another shape, or a file is damaged.
        CheckpointError: the disk fails to read a file.
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
    """The values of a box of a tensor, read in this process alone.

    If a file holds exactly this box in this dtype, the values are not copied: their memory is the file's, so do not
    write to it.

    Raises:
        ConfigError, CheckpointError: for the same reasons as `fill`.
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
    """Fill the boxes, in whatever boxes they were written. All ranks call this.

    Args:
        if_alike: further sets of boxes. A set is filled if the checkpoint has tensors of all its names and shapes.
        verify: compare what is read with its checksums.

    Returns:
        For each set of `if_alike`, whether it was filled.

    Raises:
        ConfigError: some rank finds that the checkpoint lacks a tensor, has it in another shape, or is damaged; raised
            on all ranks.
        CheckpointError: the disk fails to read files, or ranks read different folders; raised on all ranks.
    """
    wanted, index, problem, alike = list(boxes), None, None, []
    try:
        index = read_index(folder)
        alike = [all(index.shape(box.key) == box.shape for box in some) for some in if_alike]
        wanted += [box for some in itertools.compress(if_alike, alike) for box in some]
        _check_wanted(wanted, index)
    except ConfigError as error:
        problem = str(error)
    # A rank that finds a problem must tell it, or the other ranks would wait for it.
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
    """The stored boxes that overlap these boxes."""
    stored = {
        found.part: found
        for box in boxes
        for found in index.boxes[box.key]
        if _overlap(found.part, box.part) is not None
    }
    return list(stored.values())


def _on_all(action: Callable[[], None]) -> None:
    """Do `action`, then raise on all ranks the errors of any rank. If all are ConfigErrors, it raises AgreedError."""
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
    """All whole tensors whose names start with `prefix`, read in this process alone."""
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
    """Raise the errors of all ranks, with the traceback of this rank's error."""
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
    """The range [start, end) in each dimension of the whole tensor that both boxes have; None if they share nothing."""
    starts = map(max, one.offset, other.offset)
    ends = map(min, one.end, other.end)
    both = list(zip(starts, ends, strict=True))
    return both if all(start < end for start, end in both) else None


@torch.no_grad()
def _copy(data: safe_open, part: BoxPart, box: Box) -> None:
    """Copy the elements that a stored box and `box` share. Only these are read from the file."""
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
    """Ranges of a whole tensor as slices of one of its boxes, which begins at `offset`."""
    return tuple(slice(start - first, end - first) for (start, end), first in zip(ranges, offset, strict=True))
