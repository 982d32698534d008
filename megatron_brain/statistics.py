"""Statistics of comparisons over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, samples: int, seed: int) -> Estimate:
    """Mean of one value per prompt with a percentile bootstrap interval over prompts (Efron 1979).

    Raises:
        ValueError: no values.
    """
    data = numpy.asarray(values, dtype=numpy.float64)
    if data.size == 0:
        raise ValueError("no values to average")
    draws = numpy.random.default_rng(seed).integers(data.size, size=(samples, data.size))
    low, high = numpy.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(data.mean()), float(low), float(high))


def wins(scores: Sequence[float], other_scores: Sequence[float]) -> list[float]:
    """1 where a score beats the other, 0 where it loses, one half for a tie; one entry per prompt."""
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(scores, other_scores, strict=True)]
