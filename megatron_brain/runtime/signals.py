"""Signals and the time limit, which end a run early after its work is saved.

SIGTERM (the job is preempted or cancelled) and SIGUSR1 (Slurm's usual warning before the time limit) are only noted.
`Trainer._asked_to_stop` reads the note after every step, where all ranks can agree to save and stop.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# A process has one set of handlers and one start, so they are globals. `__main__` imports this before anything slow.
_started = time.monotonic()
_received: signal.Signals | None = None


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Inside the context a stop signal is noted, however often it comes, and does nothing else.

    Only the main thread may use it. The earlier handlers are put back at the end.
    """
    global _received
    before = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        # System calls of a save or a collective go on after the signal instead of failing with EINTR.
        signal.siginterrupt(number, False)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = None


def received() -> signal.Signals | None:
    """The first stop signal that this process got inside of `noted`; None if there was none, and outside of it."""
    return _received


def stop_reason(limit: float | None) -> str | None:
    """Why this process should end early, in words; None: it should not.

    Args:
        limit: minutes from its start that it may take; None: any time.
    """
    if _received is not None:
        return _received.name
    if limit is not None and (time.monotonic() - _started) / 60 >= limit:
        return f"--exit-duration-in-mins {limit:g} is over"
    return None


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number)
