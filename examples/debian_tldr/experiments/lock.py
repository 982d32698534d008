"""The lock of a WORK: one runner at one time, and none while a step of an earlier one still runs."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from state import now
from user_errors import UserError


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """Hold the lock. What is yielded is its descriptor: a process that inherits it holds the lock too, until it ends.

    Raises:
        UserError: another process holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode().strip()
            raise UserError(
                f"{work} is in use by {holder or 'another runner'}, or by a step that it started and that goes on "
                "after its end; wait for it, stop it, or give another --work"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now()}".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(work: Path) -> bool:
    """Whether a runner, or a step of one, is at work."""
    if not (work / "lock").exists():
        return False
    with (work / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
