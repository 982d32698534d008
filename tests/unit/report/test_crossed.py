"""Intervals over seeds and prompts: by hand, against a general analysis, and their coverage by simulation."""

import math
import os

import numpy
import pytest

pytest.importorskip("scipy")

from reports.crossed import crossed_interval, ratio_cells
from scipy import stats


def half_width(cells, **named):
    estimate = crossed_interval(numpy.array(cells, dtype=float), **named)
    assert estimate.high - estimate.value == pytest.approx(estimate.value - estimate.low)
    return estimate.high - estimate.value


def test_one_seed_has_the_t_interval_over_prompts():
    values = numpy.array([0.1, 0.4, 0.2, 0.9, 0.5])
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    estimate = crossed_interval(values[None])
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((values.mean(), low, high))


def test_if_seeds_alone_differ_it_is_the_t_interval_over_seeds():
    cells = numpy.array([0.2, 0.5, 0.9])[:, None] * numpy.ones((1, 7))
    low, high = stats.t.interval(0.95, 2, loc=cells.mean(), scale=stats.sem(cells[:, 0]))
    estimate = crossed_interval(cells)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_if_prompts_alone_differ_it_is_the_t_interval_over_prompts_and_seeds_do_not_narrow_it():
    values = numpy.array([0.1, 0.4, 0.2, 0.9, 0.5])
    assert half_width([values, values, values]) == pytest.approx(half_width([values]))


def test_mean_squares_by_hand():
    # Means of seeds 2 and 4, of prompts 2 and 4, of all 3. MS_seed = 2 * (1 + 1) / 1 = 4, MS_prompt likewise 4. The
    # rest is 1 - 2 - 2 + 3 = 0 and so on, all 0. Both have t of one degree of freedom, 12.706.
    expected = math.sqrt((12.7062**2 * 4 + 12.7062**2 * 4) / 4)
    assert half_width([[1, 3], [3, 5]]) == pytest.approx(expected, rel=1e-5)
    # Now the rest is +-1: MS_rest = 4, more than MS_prompt = 0 of the means of prompts, 3 and 3.
    assert half_width([[1, 3], [5, 3]]) == pytest.approx(math.sqrt(12.7062**2 * 4 / 4), rel=1e-5)


def test_seeds_that_are_alike_by_chance_do_not_narrow_it_below_what_the_answers_own_noise_allows():
    noise = numpy.random.default_rng(0).normal(size=(3, 50))
    alike = noise - noise.mean(axis=1, keepdims=True)
    rest = alike - alike.mean(axis=0)
    standard_error = math.sqrt((rest**2).sum() / (2 * 49) / 150)
    assert half_width(alike) >= stats.t.ppf(0.975, 49) * standard_error > 0.1


def test_the_interval_is_cut_at_the_bounds():
    cells = numpy.array([[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]])
    assert crossed_interval(cells).high > 1
    assert crossed_interval(cells, bounds=(0, 1)).high == 1


def test_it_does_not_depend_on_the_order_of_seeds_and_prompts_and_moves_with_the_numbers():
    cells = numpy.random.default_rng(0).normal(size=(3, 8))
    first = crossed_interval(cells)
    again = crossed_interval(cells[::-1, ::-1] * 2 + 1)
    assert (again.low, again.high) == pytest.approx((2 * first.low + 1, 2 * first.high + 1))


def test_too_little_to_say_anything_is_refused():
    with pytest.raises(AssertionError, match="3 seeds and 1 prompts"):
        crossed_interval(numpy.ones((3, 1)))
    with pytest.raises(AssertionError, match="not finite"):
        crossed_interval(numpy.array([[1.0, float("nan")]]))


def percentile_bootstrap(*, seeds, prompts, draws=1000):
    """Percentile bootstrap that draws seeds and prompts anew, jointly: what the interval is compared with."""
    generator = numpy.random.default_rng(11)
    chosen_seeds = generator.multinomial(seeds, [1 / seeds] * seeds, size=draws)
    chosen_prompts = generator.multinomial(prompts, [1 / prompts] * prompts, size=draws)

    def interval(cells):
        means = ((chosen_seeds @ cells) * chosen_prompts).sum(axis=1) / cells.size
        return numpy.percentile(means, [2.5, 97.5])

    return interval


def draw_table(generator, *, seeds, prompts, seed_effect, prompt_effect):
    """Random effects with the mean 0. The seed effect is in units of the noise of a seed's mean, 1 / sqrt(prompts)."""
    return (
        generator.normal(size=(seeds, 1)) * seed_effect / math.sqrt(prompts)
        + generator.normal(size=(1, prompts)) * prompt_effect
        + generator.normal(size=(seeds, prompts))
    )


def coverage(trials, interval, **kind):
    """Share of trials in which an interval holds the true mean."""
    generator = numpy.random.default_rng(7)
    intervals = [interval(draw_table(generator, **kind)) for _ in range(trials)]
    return numpy.mean([low <= 0 <= high for low, high in intervals])


def ours(cells):
    estimate = crossed_interval(cells)
    return estimate.low, estimate.high


@pytest.mark.parametrize("prompt_effect", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed_effect", [0.0, 1.0, 3.0, 10.0])
def test_three_seeds_cover_the_true_mean_at_least_as_often_as_said(seed_effect, prompt_effect):
    trials = 400
    covered = coverage(trials, ours, seeds=3, prompts=40, seed_effect=seed_effect, prompt_effect=prompt_effect)
    # Three standard deviations of a binomial of 400 trials below 0.95. Above: not much too wide either.
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials) <= covered <= 0.995


def test_a_percentile_bootstrap_of_three_seeds_covers_too_rarely():
    kind = {"seeds": 3, "prompts": 40, "seed_effect": 10.0, "prompt_effect": 1.0}
    assert coverage(300, percentile_bootstrap(seeds=3, prompts=40), **kind) < 0.85


@pytest.mark.parametrize("seeds", [2, 5, 10])
def test_other_numbers_of_seeds_are_covered_too(seeds):
    assert 0.917 <= coverage(400, ours, seeds=seeds, prompts=40, seed_effect=2.0, prompt_effect=1.0) <= 0.995


def draw_win_rates(generator):
    """Wins of 3 seeds on 100 prompts whose chances differ by seed and prompt; the true win-rate is 1/2 by symmetry."""
    logits = generator.normal(size=(3, 1)) * 0.2 + generator.normal(size=(1, 100))
    return (generator.random((3, 100)) < 1 / (1 + numpy.exp(-logits))).astype(float)


def test_win_rates_are_covered_too():
    generator = numpy.random.default_rng(3)
    estimates = [crossed_interval(draw_win_rates(generator), bounds=(0, 1)) for _ in range(400)]
    assert 0.917 <= numpy.mean([each.low <= 0.5 <= each.high for each in estimates]) <= 0.995


def test_a_ratio_is_the_ratio_of_the_means_with_the_interval_of_fieller_where_the_denominator_is_known_well():
    generator = numpy.random.default_rng(1)
    below = generator.normal(2.0, 0.1, size=(1, 400))
    above = 0.6 * below + generator.normal(0.0, 0.3, size=(1, 400))
    estimate = crossed_interval(ratio_cells(above, below))
    assert estimate.value == pytest.approx(above.mean() / below.mean())
    # Fieller: the ratios r for which the mean of above - r * below is not different from 0.
    inside = [r for r in numpy.linspace(0.5, 0.7, 2001) if holds_zero(crossed_interval(above - r * below))]
    assert (estimate.low, estimate.high) == pytest.approx((inside[0], inside[-1]), abs=2e-4)


def holds_zero(estimate):
    return estimate.low <= 0 <= estimate.high


def test_a_ratio_to_what_may_be_zero_is_unknown():
    assert ratio_cells(numpy.ones((1, 4)), numpy.array([[1.0, -1.0, 0.5, -0.4]])) is None


@pytest.mark.skipif("RUN_SLOW_TESTS" not in os.environ, reason="RUN_SLOW_TESTS=1 simulates the table of docs/report.md")
@pytest.mark.parametrize("prompt_effect", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed_effect", [0.0, 1.0, 3.0, 10.0])
def test_the_measured_coverage_of_the_documentation(seed_effect, prompt_effect):
    kind = {"seeds": 3, "prompts": 300, "seed_effect": seed_effect, "prompt_effect": prompt_effect}
    covered, by_bootstrap = (
        coverage(2000, interval, **kind) for interval in (ours, percentile_bootstrap(seeds=3, prompts=300))
    )
    print(f"| {seed_effect:g} | {prompt_effect:g} | {covered:.3f} | {by_bootstrap:.3f} |")
    assert 0.935 <= covered <= 0.995
