"""The processes of a conversion: each writes files of its own, and all stop if one fails."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from safetensors import SafetensorError

from megatron_brain import files
from megatron_brain.checkpointing import CheckpointError
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.conversion.errors import ConversionError, MismatchError
from megatron_brain.errors import ConfigError, UserError
from megatron_brain.runtime import parallel

log = logging.getLogger(__name__)

_TIMEOUT_MINUTES = 7 * 24 * 60
"""How long processes wait for the slowest one. A process that has died is noticed at once."""

_EXPECTED = (UserError, MismatchError, OSError, SafetensorError, CheckpointError)
"""Errors that their message explains."""

T = TypeVar("T")
Item = TypeVar("Item")


class Workers:
    """All processes that torchrun started, or this one alone."""

    def __init__(self) -> None:
        self.parallel = parallel.start(ParallelConfig(distributed_timeout_minutes=_TIMEOUT_MINUTES), seed=0)
        self._group = self.parallel.host_group()

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one process may do."""
        return self.parallel.rank == 0

    def all(self, action: Callable[[], T]) -> T:
        """Run `action` on every process. All processes call this.

        Returns:
            What `action` returned on this process.

        Raises:
            ConfigError, MismatchError, ConversionError: `action` failed on some process. All processes raise the same.
        """
        return self._run(action, actors=self.parallel.world_size)

    def first(self, action: Callable[[], T]) -> T | None:
        """Like `all`, but only the first process runs `action`. The others wait and get None."""
        return self._run(action if self.is_first else lambda: None, actors=1)

    def gather(self, item: T) -> list[T]:
        """The items of all processes, in the order of ranks. Every process gets them."""
        return self.parallel.gather_over_world(item, self._group)

    def share(self, items: Sequence[Item], size: Callable[[Item], int]) -> list[Item]:
        """The items that this process takes, in their order. The sums of sizes are about equal on all processes."""
        load = [0] * self.parallel.world_size
        mine = []
        for place, item in sorted(enumerate(items), key=lambda found: size(found[1]), reverse=True):
            taker = load.index(min(load))
            load[taker] += size(item)
            if taker == self.parallel.rank:
                mine.append(place)
        return [items[place] for place in sorted(mine)]

    def _run(self, action: Callable[[], T], *, actors: int) -> T:
        result, error = None, None
        try:
            with files.explained():
                result = action()
        except Exception as failed:
            if not isinstance(failed, _EXPECTED):
                log.exception("rank %d failed", self.parallel.rank)
            error = failed
        told = self.gather(None if error is None else (_kind(error), _in_words(error)))
        failures = [(rank, *found) for rank, found in enumerate(told) if found is not None]
        if not failures:
            return result
        _, kind, words = failures[0]
        # A mistake in the request is the same on all processes, so its message names no rank.
        common = kind is not ConversionError and [found[1:] for found in failures] == [(kind, words)] * actors
        if len(told) > 1 and not common:
            words = "; ".join(f"rank {rank}: {said}" for rank, _, said in failures)
        raise kind(words) from error


def _kind(error: Exception) -> type[Exception]:
    if isinstance(error, MismatchError):
        return MismatchError
    return ConfigError if isinstance(error, UserError) else ConversionError


def _in_words(error: Exception) -> str:
    plain = isinstance(error, (UserError, MismatchError, CheckpointError))
    return str(error) if plain else f"{type(error).__name__}: {error}"
