"""Errors on which all ranks agree, so that none waits for one that has failed."""

from collections.abc import Sequence

from megatron_brain.errors import AgreedError
from megatron_brain.runtime.parallel import Parallel


def raise_on_all(problem: Exception | None, parallel: Parallel) -> None:
    """Raise on all ranks if one of them has a problem. All ranks must call it.

    Raises:
        AgreedError: the message of the first rank that has one, with the ranks if not all have one.
    """
    told = parallel.gather_over_world(None if problem is None else str(problem))
    failed = [rank for rank, text in enumerate(told) if text is not None]
    if failed:
        first = told[failed[0]]
        raise AgreedError(first if len(failed) == len(told) else f"{first} ({in_words(failed)} alone)") from problem


def in_words(ranks: Sequence[int]) -> str:
    """The ranks in words."""
    listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
