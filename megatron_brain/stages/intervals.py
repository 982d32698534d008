"""Statistics of comparisons over prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, samples: int, seed: int) -> Estimate:
    """Mean of `values`, one per prompt and at least one, with a percentile bootstrap interval over prompts
    (Efron 1979).
    """
    data = numpy.asarray(values, dtype=numpy.float64)
    assert data.size, "no values to average"
    draws = numpy.random.default_rng(seed).integers(data.size, size=(samples, data.size))
    low, high = numpy.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(data.mean()), float(low), float(high))


def bootstrap_statistic(
    columns: Sequence[Sequence[float]],
    statistic: Callable[[numpy.ndarray], numpy.ndarray],
    *,
    samples: int,
    seed: int,
) -> Estimate | None:
    """A statistic of several numbers per prompt with a percentile bootstrap interval over prompts. With a seed they are
    resampled as `bootstrap` does it.

    Args:
        columns: `[columns, prompts]`, at least one prompt.
        statistic: makes `[samples]` of `[columns, samples, prompts]`; NaN where it has no value.

    Returns:
        the estimate. A resampling without a value counts as one below the interval and as one above it, because
        nobody knows on which side it belongs: such resamplings never make the interval narrower. None where an end
        would be one of them (they are more than about 2.5%), or where the prompts themselves give no value.
    """
    data = numpy.asarray(columns, dtype=numpy.float64)
    assert data.shape[1], "no values"
    value = float(statistic(data[:, None, :])[0])
    draws = numpy.random.default_rng(seed).integers(data.shape[1], size=(samples, data.shape[1]))
    resampled = statistic(data[:, draws])
    unknown = numpy.isnan(resampled)
    with numpy.errstate(invalid="ignore"):  # Between infinity and a number lies no number.
        low = float(numpy.percentile(numpy.where(unknown, -numpy.inf, resampled), 2.5))
        high = float(numpy.percentile(numpy.where(unknown, numpy.inf, resampled), 97.5))
    return Estimate(value, low, high) if all(map(math.isfinite, (value, low, high))) else None


def ratio(columns: numpy.ndarray) -> numpy.ndarray:
    """A statistic, `[2, samples, prompts]` -> `[samples]`: the sum of the first column over that of the second, whose
    numbers are not negative. NaN where that is 0."""
    assert (columns[1] >= 0).all(), "a negative denominator"
    above, below = columns.sum(axis=-1)
    return numpy.divide(above, below, out=numpy.full(below.shape, numpy.nan), where=below > 0)


def wins(scores: Sequence[float], other_scores: Sequence[float], *, ties: Sequence[bool] | None = None) -> list[float]:
    """1 where a score beats the other, 0 where it loses, one half for a tie; one entry per prompt.

    Args:
        scores, other_scores: numbers that are not NaN, because NaN neither wins nor loses nor ties.
        ties: prompts that tie for any scores, because their answers are equal. Scores may still differ by rounding.
    """
    assert not any(score != score for score in (*scores, *other_scores)), "a score is NaN: there is no winner"
    ties = [False] * len(scores) if ties is None else ties
    return [0.5 if tie or a == b else float(a > b) for a, b, tie in zip(scores, other_scores, ties, strict=True)]
