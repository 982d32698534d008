"""Compares a server's log-probabilities of a few fixed texts with the trainer's: the proof of which weights it has."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

Values = Sequence[Sequence[float]]
"""For each probe, the log-probabilities of its tokens from the second on, in nats at temperature 1."""

_CLEAR = 4.0
"""Standard deviations by which a change of weights must stand out of rounding before a server is judged by it."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The trainer's log-probabilities of the probes under the weights that were handed over, and under those before.

    label, label_before: what the weights are, in words.
    """

    label: str
    values: Values
    label_before: str | None = None
    values_before: Values | None = None

    def problem(self, found: Values, limit: float) -> str | None:
        """What a server holds instead of the weights that were handed over, in words; None if it holds these.

        Args:
            found: the server's log-probabilities.
            limit: largest mean difference, in nats per token.
        """
        difference = mean_difference(found, self.values)
        before = None if self.values_before is None else mean_difference(found, self.values_before)
        nearer_to_before = before is not None and self._is_nearer_to_before(found)
        if difference <= limit and not nearer_to_before:
            return None
        if before is not None and before <= limit:
            return (
                f"still answers with the weights of before ({self.label_before}): its log-probabilities of the probes "
                f"differ from the trainer's by {before:.3g} nats per token under these, and by {difference:.3g} under "
                f"the new ones ({self.label})"
            )
        other = "" if before is None else f", and by {before:.3g} under those of before ({self.label_before})"
        return (
            f"holds other weights than it was given ({self.label}): its log-probabilities of the probes differ from "
            f"the trainer's by {difference:.3g} nats per token{other}; at most {limit:g} is allowed "
            "(--max-engine-difference)"
        )

    def _is_nearer_to_before(self, found: Values) -> bool:
        """Whether the server's values are nearer to those of before, where the two can be told apart.

        For each token the squared distance to the new value minus that to the value of before is taken; its mean is
        above 0 where the server has the weights of before. The mean must stand out of its own standard error: the
        trainer's values are rounded too, so that most of the change from one to the next may be rounding.
        """
        assert self.values_before is not None
        new, before = (_squares(found, values) for values in (self.values, self.values_before))
        nearer = [a - b for a, b in zip(new, before, strict=True)]
        return statistics.fmean(nearer) > _CLEAR * statistics.stdev(nearer) / math.sqrt(len(nearer))


def mean_difference(one: Values, other: Values) -> float:
    """Mean absolute difference per token."""
    return sum(abs(a - b) for a, b in _pairs(one, other)) / _count(one)


def _squares(one: Values, other: Values) -> list[float]:
    return [(a - b) ** 2 for a, b in _pairs(one, other)]


def _count(values: Values) -> int:
    return sum(len(row) for row in values)


def _pairs(one: Values, other: Values) -> list[tuple[float, float]]:
    return list(zip(chain.from_iterable(one), chain.from_iterable(other), strict=True))
