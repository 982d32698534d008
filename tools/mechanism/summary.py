"""From moments of single prompts to figures over prompts, with intervals."""

from collections.abc import Mapping, Sequence

import numpy

from mechanism.estimators import MOMENTS
from megatron_brain.objectives.brain import Baseline

Moments = Mapping[tuple[Baseline, int], Mapping[str, float]]

FIGURES = ("bias", "variance", "mean_squared_error", "cosine", "mean_squared_error_ratio")
"""What `summarize` gives for every baseline and group size. All are ratios of sums over prompts, so that a prompt
counts by the size of its gradient, as in training. R is the reference E_posterior[g], G the gradient of a group.

- bias: |E G - R| / |R|; 0 where the estimate of its square is negative.
- variance: E |G - E G|^2 / |R|^2.
- mean_squared_error: E |G - R|^2 / |R|^2, the sum of bias^2 and variance.
- cosine: <E G, R> / sqrt(E |G|^2 |R|^2), how far a group points along the reference.
- mean_squared_error_ratio: the mean squared error over that of `self-normalized` at the same group size.
"""


def summarize(prompts: Sequence[Moments], *, bootstrap_samples: int, seed: int) -> list[dict]:
    """A row for every baseline and group size, with each of FIGURES as {value, low, high}.

    The ends are those of a 95% percentile interval by bootstrap over prompts; all rows draw the same prompts. A value
    or an end is None where |R|^2 is estimated as 0 or less, because the reference is lost in its noise.
    """
    keys = list(prompts[0])
    # [prompts, keys, moments]
    table = numpy.array([[[each[key][name] for name in MOMENTS] for key in keys] for each in prompts])
    whole = _figures(table.sum(0)[None], keys)
    draws = numpy.random.default_rng(seed).integers(len(prompts), size=(bootstrap_samples, len(prompts)))
    drawn = _figures(numpy.stack([table[draw].sum(0) for draw in draws]), keys)
    low, high = numpy.percentile(drawn, [2.5, 97.5], axis=0, method="nearest")
    return [
        {
            "baseline": baseline,
            "n": n,
            **{
                name: {
                    "value": _finite(whole[0, row, at]),
                    "low": _finite(low[row, at]),
                    "high": _finite(high[row, at]),
                }
                for at, name in enumerate(FIGURES)
            },
        }
        for row, (baseline, n) in enumerate(keys)
    ]


def _figures(sums: numpy.ndarray, keys: Sequence[tuple[Baseline, int]]) -> numpy.ndarray:
    """FIGURES `[draws, keys, figures]` from sums of MOMENTS over prompts `[draws, keys, moments]`."""
    squared, variance, bias_squared, along, reference = numpy.moveaxis(sums, -1, 0)
    error = numpy.maximum(bias_squared, 0.0) + variance
    of_self_normalized = error[:, [keys.index(("self-normalized", n)) for _, n in keys]]
    known = reference > 0
    reference = numpy.where(known, reference, 1.0)
    relative = [
        numpy.sqrt(numpy.maximum(bias_squared, 0.0) / reference),
        variance / reference,
        error / reference,
    ]
    relative = [numpy.where(known, each, numpy.inf) for each in relative]
    cosine = numpy.where(known, along / numpy.sqrt(numpy.maximum(squared, 1e-300) * reference), numpy.inf)
    return numpy.stack([*relative, cosine, error / of_self_normalized], axis=-1)


def _finite(value: float) -> float | None:
    return float(value) if numpy.isfinite(value) else None
