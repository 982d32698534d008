"""Writes one item while the next one is read."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Contents = TypeVar("Contents")
Result = TypeVar("Result")


def write_behind(
    items: Iterable[Item], read: Callable[[Item], Contents], write: Callable[[Item, Contents], Result]
) -> list[Result]:
    """Read each item's contents, and write them in a thread while the next are read. At most two are in memory.

    The first error of `read` or `write` is raised when the write before it has ended.

    Returns:
        What `write` returned, in order.
    """
    results, pending = [], None
    with ThreadPoolExecutor(max_workers=1) as thread:
        for item in items:
            contents = read(item)
            if pending is not None:
                results.append(pending.result())
            pending = thread.submit(write, item, contents)
        if pending is not None:
            results.append(pending.result())
    return results
