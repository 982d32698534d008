"""Work in the background of some ranks, for which all ranks wait together: all get the same error, and none hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from megatron_brain.errors import AgreedError, UserError
from megatron_brain.files import explained
from megatron_brain.generation.engine import Interrupted
from megatron_brain.runtime import signals
from megatron_brain.runtime.parallel import Parallel

_HEARTBEAT = 1.0
"""Seconds after which ranks that wait hear of each other: none sits longer in one collective."""

T = TypeVar("T")


class Job(Generic[T]):
    """A coroutine that runs in a thread of its own. The thread does not keep the process alive."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._future: Future[T] = Future()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vllm-client", daemon=True)
        self._thread.start()

    def finished(self, *, within: float) -> bool:
        """Whether it has ended, or ends within so many seconds."""
        self._thread.join(within)
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What it failed with; it must have ended."""
        return self._future.exception(timeout=0)

    @property
    def result(self) -> T:
        """What it returned; it must have ended."""
        return self._future.result(timeout=0)

    def cancel(self) -> None:
        """Stop it at the next request that it waits for."""
        self._started.wait()
        if not self._future.done():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._future.set_result(asyncio.run(self._main()))
        except BaseException as error:  # Whoever waits for the job raises it.
            self._future.set_exception(error)

    async def _main(self) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._started.set()
        return await self._work


def wait_together(job: Job[T] | None, parallel: Parallel, *, what: str, stoppable: bool = True) -> T | None:
    """Wait until the jobs of all ranks have ended. All ranks call it, with their job if they have one.

    Args:
        what: what is done meanwhile, in words.
        stoppable: whether a stop signal ends the wait.

    Returns:
        The result of this rank's job.

    Raises:
        Interrupted: on all ranks: a rank got a stop signal. The jobs are cancelled.
        AgreedError: on all ranks, with the same text: a job failed. The others are cancelled.
    """
    group = parallel.host_group()
    while True:
        running = job is not None and not job.finished(within=_HEARTBEAT)
        error = job.error if job is not None and not running else None
        stop = stoppable and signals.received() is not None
        flags = torch.tensor([running, error is not None, stop], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        any_running, any_failed, any_stopped = flags.tolist()
        if any_failed or any_stopped:
            break
        if not any_running:
            return None if job is None else job.result
    if job is not None:
        job.cancel()
    if any_stopped:
        _raise_interrupted(parallel, what)
    _raise_agreed(error, parallel)
    raise AssertionError("a rank that failed has told no error")


def run_on_all(action: Callable[[], T], parallel: Parallel) -> T:
    """What `action` returns on this rank. All ranks call it; it must not wait for other ranks where it may fail alone.

    Raises:
        AgreedError: on all ranks, with the same text: it failed on some rank.
    """
    result, problem = None, None
    try:
        with explained():
            result = action()
    except Exception as error:
        problem = error
    _raise_agreed(problem, parallel)
    return result  # type: ignore[return-value]


def _raise_agreed(mine: BaseException | None, parallel: Parallel) -> None:
    """Raise on all ranks if one has an error. A fault of this package keeps its traceback on the rank that had it."""
    told = parallel.gather_over_world(None if mine is None else _in_words(mine), parallel.host_group())
    failed = [text for text in told if text is not None]
    if not failed:
        return
    if mine is not None and not isinstance(mine, UserError):
        raise mine
    raise AgreedError(failed[0]) from mine


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _raise_interrupted(parallel: Parallel, what: str) -> None:
    signal = signals.received()
    told = parallel.gather_over_world(None if signal is None else signal.name, parallel.host_group())
    why = ", ".join(f"{name} (rank {rank})" for rank, name in enumerate(told) if name is not None)
    raise Interrupted(f"{why} while {what}")
