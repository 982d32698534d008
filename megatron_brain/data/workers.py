"""Runs a function on many tasks in several processes. Results come in order, and each process is set up once."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron_brain.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_state: Any = None


class WorkerKilledError(UserError):
    """A process was killed during its work, often because memory ran out."""


def map_in_order(
    function: Callable[[Any, Task], Result], tasks: Iterable[Task], *, workers: int, set_up: Callable[[], Any]
) -> Iterator[Result]:
    """Yield `function(state, task)` for each task, in order. Only a few tasks are in memory at a time.

    Args:
        function: importable by name.
        tasks: read on demand.
        workers: number of processes; with 1, this process does the work.
        set_up: called once in each process, returns the state; it must be picklable.

    Raises:
        WorkerKilledError: a process was killed.
        Exception: the error of `function` for the first task that fails; later tasks are given up.
    """
    if workers == 1:
        state = set_up()
        yield from (function(state, task) for task in tasks)
        return
    # Processes are spawned, not forked: a forked copy would lack the threads of the tokenizers library.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(set_up,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_run, function, task))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerKilledError("a worker process was killed, maybe for its memory: try fewer --workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(set_up: Callable[[], Any]) -> None:
    global _state
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = set_up()


def _end_with_parent() -> None:
    """End this worker when its parent is killed. Otherwise it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_state, task)
