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


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, samples: int, seed: int
) -> Estimate | None:
    """The ratio of two means over the same prompts, with an interval as `bootstrap` makes it: both means are those of
    the same resampled prompts. With a seed they are resampled as `bootstrap` does it.

    Args:
        numerators, denominators: a number for each prompt; denominators are not negative.

    Returns:
        None where all denominators of some resampling are 0, so that the interval has no end.
    """
    pairs = numpy.asarray([numerators, denominators], dtype=numpy.float64)
    assert pairs.shape[1] and (pairs[1] >= 0).all(), "no values to average, or a negative denominator"
    draws = numpy.random.default_rng(seed).integers(pairs.shape[1], size=(samples, pairs.shape[1]))
    above, below = pairs[:, draws].mean(axis=2)
    if not below.all():
        return None
    low, high = numpy.percentile(above / below, [2.5, 97.5])
    return Estimate(float(pairs[0].mean() / pairs[1].mean()), float(low), float(high))


def wins(scores: Sequence[float], other_scores: Sequence[float], *, ties: Sequence[bool] | None = None) -> list[float]:
    """1 where a score beats the other, 0 where it loses, one half for a tie; one entry per prompt.

    Args:
        scores, other_scores: numbers that are not NaN, because NaN neither wins nor loses nor ties.
        ties: prompts that tie for any scores, because their answers are equal. Scores may still differ by rounding.
    """
    assert not any(score != score for score in (*scores, *other_scores)), "a score is NaN: there is no winner"
    ties = [False] * len(scores) if ties is None else ties
    return [0.5 if tie or a == b else float(a > b) for a, b, tie in zip(scores, other_scores, ties, strict=True)]


def bootstrap_statistic(
    columns: Sequence[Sequence[float]],
    statistic: Callable[[numpy.ndarray], numpy.ndarray],
    *,
    samples: int,
    seed: int,
) -> Estimate | None:
    """A statistic of several numbers per prompt with a percentile bootstrap interval over prompts.

    Args:
        columns: `[columns, prompts]`, at least one prompt.
        statistic: makes `[samples]` of `[columns, samples, prompts]`; NaN where it has no value.

    Returns:
        the estimate, whose interval is over the resamplings with a value; None if the prompts themselves, or all
        resamplings, give none.
    """
    data = numpy.asarray(columns, dtype=numpy.float64)
    value = float(statistic(data[:, None, :])[0])
    draws = numpy.random.default_rng(seed).integers(data.shape[1], size=(samples, data.shape[1]))
    resampled = statistic(data[:, draws])
    if math.isnan(value) or numpy.isnan(resampled).all():
        return None
    low, high = numpy.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
