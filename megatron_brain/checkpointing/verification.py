"""Compares the boxes of a checkpoint with their checksums."""

import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_brain.checkpointing.boxes import BoxPart, divide
from megatron_brain.checkpointing.checksums import checksum
from megatron_brain.checkpointing.data_files import by_file, opened, stored_name
from megatron_brain.checkpointing.errors import CURE, DamagedError
from megatron_brain.checkpointing.index import StoredBox

_MOST_TOLD = 3


def find_damaged_boxes(boxes: Iterable[StoredBox], folder: Path) -> Iterator[str]:
    """Names and files of the boxes whose values are not those that were written.

    Boxes without a checksum, which an earlier version wrote, are skipped.

    Raises:
        DamagedError, CheckpointError: a file cannot be read.
    """
    for file, batch in by_file((box for box in boxes if box.checksum is not None), of=lambda box: box):
        with opened(folder / file) as data:
            found = [checksum(data.get_tensor(stored_name(box.part))) for box in batch]
        yield from (f"{stored_name(box.part)} in {file}" for box, sum in zip(batch, found) if sum != box.checksum)


def require_sound(boxes: Iterable[StoredBox], folder: Path) -> None:
    """Raise if the values of a box are not those that were written.

    Raises:
        DamagedError: it names the damaged boxes, their files and the cure.
    """
    found = list(find_damaged_boxes(boxes, folder))
    if found:
        more = f" and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
        raise DamagedError(
            f"{folder}: damaged: {', '.join(found[:_MOST_TOLD])}{more}: the values are not those that were saved, by "
            f"their checksum. {CURE}"
        )


def my_share(needed: Sequence[StoredBox], told: Sequence[tuple[str, list[BoxPart]]], rank: int) -> list[StoredBox]:
    """The boxes that this rank verifies: the processes of a node divide the boxes that any of them needs.

    Args:
        needed: the boxes that this rank needs.
        told: `host_and_parts` of every rank.
    """
    host = told[rank][0]
    neighbours = [place for place, (name, _) in enumerate(told) if name == host]
    mine = set(divide([told[place][1] for place in neighbours])[neighbours.index(rank)])
    return [box for box in needed if box.part in mine]


def host_and_parts(needed: Sequence[StoredBox]) -> tuple[str, list[BoxPart]]:
    """This node's name and the boxes that this rank needs, for `my_share`."""
    return socket.gethostname(), [box.part for box in needed]
