"""Checksums of what a checkpoint holds: a bit that flipped on the way or on the disk is found when it is loaded.

They are xxHash's XXH3 of 64 bits, made while a file is written. That is no cryptography: it finds accidents.
"""

import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_brain.checkpointing.boxes import Part, divide
from megatron_brain.checkpointing.errors import CURE, DamagedError
from megatron_brain.checkpointing.index import StoredBox

_MOST_TOLD = 3


def checksum(values: Tensor) -> str:
    """Checksum of a contiguous tensor's bytes, on the host."""
    return xxhash.xxh3_64_hexdigest(values.detach().reshape(-1).view(torch.uint8).numpy())


def file_checksum(path: Path) -> str:
    """Checksum of a small file."""
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def damage(boxes: Iterable[StoredBox], folder: Path) -> Iterator[str]:
    """Names of the boxes whose values are not those that were written, with their files.

    One box is in memory at a time. Boxes without a checksum, of an earlier version, are passed over.

    Raises:
        DamagedError, CheckpointError: a file cannot be read.
    """
    from megatron_brain.checkpointing.storage import opened, stored_name

    for box in boxes:
        if box.checksum is None:
            continue
        # A file counts as this process's memory while it is open.
        with opened(folder / box.file) as data:
            found = checksum(data.get_tensor(stored_name(box.part)))
        if found != box.checksum:
            yield f"{stored_name(box.part)} in {box.file}"


def require_sound(boxes: Iterable[StoredBox], folder: Path) -> None:
    """Raise where the values of a box are not those that were written.

    Raises:
        DamagedError: they are not; names the boxes, their files and the cure.
    """
    found = list(damage(boxes, folder))
    if found:
        more = f" and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
        raise DamagedError(
            f"{folder}: damaged: {', '.join(found[:_MOST_TOLD])}{more}: the values are not those that were saved, by "
            f"their checksum. {CURE}"
        )


def my_share(needed: Sequence[StoredBox], told: Sequence[tuple[str, list[Part]]], rank: int) -> list[StoredBox]:
    """The boxes this rank looks at: the processes of a node divide those that any of them needs.

    Args:
        needed: by this rank.
        told: `here` of every rank.
    """
    host = told[rank][0]
    neighbours = [place for place, (name, _) in enumerate(told) if name == host]
    mine = set(divide([told[place][1] for place in neighbours])[neighbours.index(rank)])
    return [box for box in needed if box.part in mine]


def here(needed: Sequence[StoredBox]) -> tuple[str, list[Part]]:
    """This node's name and the parts that this rank needs, for `my_share`."""
    return socket.gethostname(), [box.part for box in needed]
