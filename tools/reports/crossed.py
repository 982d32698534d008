"""Intervals of a mean over seeds and prompts, where every seed answers the same prompts."""

import math

import numpy
from scipy import stats

from megatron_brain.stages.intervals import Estimate

_LEVEL = 0.975
"""Upper quantile of a two-sided 95% interval."""


def crossed_interval(cells: numpy.ndarray, *, bounds: tuple[float, float] | None = None) -> Estimate:
    """Mean of a table of seeds by prompts, and its 95% interval for other seeds *and* other prompts.

    The model is `y[s, p] = mean + seed[s] + prompt[p] + rest[s, p]` with random effects of any three variances. The
    prompts are the same in all seeds (a crossed design), so the mean has the variance

        var(seed) / S + var(prompt) / P + var(rest) / (S P).

    The first part is what another training run changes, the second what other prompts of the same kind change, the
    third what is drawn anew for each answer. The mean squares of a two-way analysis of variance estimate all three
    (Searle, Casella, McCulloch 1992, chapter 4): `MS_seed / (S P)` has the first and the third with S - 1 degrees of
    freedom, `(MS_prompt - MS_rest) / (S P)` has the second with P - 1. The half width of the interval is

        sqrt(t(S-1)^2 MS_seed / (S P) + t(P-1)^2 max(0, MS_prompt - MS_rest) / (S P)),

    Banerjee's interval for a sum of means with unknown, unequal variances (Sankhya 22, 1960). For independent normal
    parts with exact chi-square estimates it covers at least 95%, whatever the ratio of the variances. It is exact if
    only seeds differ (t with S - 1 degrees of freedom) or only prompts (t with P - 1). Seeds that are alike by chance
    must not make it narrower than what is known well: it is at least

        t(P-1) sqrt(max(MS_prompt, MS_rest) / (S P)),

    the half width if training runs did not differ.

    A percentile bootstrap that draws seeds and prompts anew is too narrow for three seeds: their spread in the draws
    is only 2/3 of the variance, and nothing accounts for estimating it from two degrees of freedom. `docs/report.md`
    has the measured coverage of both.

    With one seed the interval is over prompts alone. It says nothing of another seed; the caller must say so. A table
    without any variation has an interval of no width.

    Args:
        cells: float `[S, P]`, finite; S >= 1 seeds, P >= 2 prompts.
        bounds: the smallest and the largest possible mean, such as 0 and 1 of a win-rate; the interval is cut there.
    """
    cells = numpy.asarray(cells, dtype=numpy.float64)
    seeds, prompts = cells.shape
    assert seeds >= 1 and prompts >= 2, f"no interval follows from {seeds} seeds and {prompts} prompts"
    assert numpy.isfinite(cells).all(), "a number is not finite"
    value, of_prompts = float(cells.mean()), cells.mean(axis=0)
    prompt_square = seeds * of_prompts.var(ddof=1)
    by_prompts = stats.t.ppf(_LEVEL, prompts - 1) ** 2
    if seeds == 1:
        half = math.sqrt(by_prompts * prompt_square / prompts)
    else:
        of_seeds = cells.mean(axis=1)
        seed_square = prompts * of_seeds.var(ddof=1)
        rest = cells - of_seeds[:, None] - of_prompts[None, :] + value
        rest_square = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
        by_seeds = stats.t.ppf(_LEVEL, seeds - 1) ** 2
        by_both = by_seeds * seed_square + by_prompts * max(0.0, prompt_square - rest_square)
        half = math.sqrt(max(by_both, by_prompts * max(prompt_square, rest_square)) / cells.size)
    low, high = value - half, value + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(value, low, high)


def ratio_cells(numerators: numpy.ndarray, denominators: numpy.ndarray) -> numpy.ndarray | None:
    """Cells whose mean is the ratio of two means, and whose interval is that of the ratio by the delta method.

    With R the ratio of the means, a cell is `R + (numerator - R denominator) / mean(denominator)`.

    Args:
        numerators, denominators: float `[S, P]`.

    Returns:
        float `[S, P]`; None where the interval of the mean denominator contains 0, because nothing is known then.
    """
    below = crossed_interval(denominators)
    if below.low <= 0 <= below.high:
        return None
    ratio = numerators.mean() / below.value
    return ratio + (numerators - ratio * denominators) / below.value
