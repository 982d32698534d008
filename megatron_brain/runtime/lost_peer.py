"""The error a rank ends with when a collective fails because another process or node is gone."""

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

_PACKAGE = Path(__file__).parents[1]
_MEETING = ("init_process_group", "rendezvous")
"""Operations by which ranks find each other."""


class LostPeerError(RuntimeError):
    """Another rank ended or cannot be reached. `__cause__` is the library's own error."""


@contextlib.contextmanager
def explained(timeout_minutes: int) -> Iterator[None]:
    """Turn the error of a failed collective into one that names the operation and the cure.

    Args:
        timeout_minutes: --distributed-timeout-minutes of the run.

    Raises:
        LostPeerError: a collective failed because of another rank. Other errors pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        if _operation(error).startswith(_MEETING):
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            reason = str(error).partition("\n")[0]
            raise LostPeerError(
                f"the ranks could not meet at {place} (MASTER_ADDR:MASTER_PORT) within --distributed-timeout-minutes "
                f"{timeout_minutes}: {reason}. Is that the host of rank 0, can it be reached from here, is the port "
                f"free on it, and have all {os.environ.get('WORLD_SIZE', '?')} processes been started?"
            ) from error
        raise LostPeerError(
            f"lost contact with another rank in {_operation(error)}: that rank ended, or its node did not answer "
            f"within --distributed-timeout-minutes {timeout_minutes}. Its own output may say why. Start all nodes "
            "again with the same command and --auto-resume to go on from the latest checkpoint."
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether torch.distributed or gloo raised it: gloo raises plain RuntimeErrors that name gloo's source file."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _operation(error: RuntimeError) -> str:
    """The failed call in words: `all_reduce, called in any_rank (megatron_brain/runtime/parallel.py:73)`."""
    frames = traceback.extract_tb(error.__traceback__)
    caller = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents][-1]
    # The innermost public function is the collective, or the library's function that waited for a transfer.
    name = [frame.name for frame in frames if not frame.name.startswith("_")][-1]
    return f"{name}, called in {caller.name} ({Path(caller.filename).relative_to(_PACKAGE.parent)}:{caller.lineno})"
