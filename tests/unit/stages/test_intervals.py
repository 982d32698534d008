"""Bootstrap intervals and win counts."""

import numpy
import pytest

from megatron_brain.stages.intervals import bootstrap, bootstrap_statistic, ratio, wins


def test_wins_count_one_losses_zero_and_ties_one_half():
    assert wins([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]) == [1.0, 0.0, 0.5]


def test_wins_of_both_sides_add_up_to_the_number_of_prompts():
    one, other = [0.1, 0.5, 0.2, 0.2], [0.3, 0.5, 0.1, 0.2]
    assert sum(wins(one, other)) + sum(wins(other, one)) == 4


def test_a_tie_that_is_known_counts_one_half_whatever_the_scores():
    assert wins([2.0, 1.0], [1.0, 1.0 + 1e-9], ties=[False, True]) == [1.0, 0.5]


def test_wins_refuse_scores_that_are_no_numbers():
    for scores in ([float("nan")], [1.0]), ([1.0], [float("nan")]):
        with pytest.raises(AssertionError, match="a score is NaN: there is no winner"):
            wins(*scores)


def test_wins_refuse_score_lists_of_different_lengths():
    with pytest.raises(ValueError, match="shorter"):
        wins([1.0, 2.0], [1.0])


def test_estimate_of_a_constant_has_no_width():
    estimate = bootstrap([0.5, 0.5, 0.5], samples=100, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


def test_value_is_the_mean_and_lies_inside_the_interval():
    estimate = bootstrap([1.0, 0.0, 0.0, 1.0, 1.0], samples=1000, seed=0)
    assert estimate.value == pytest.approx(0.6)
    assert 0.0 <= estimate.low < 0.6 < estimate.high <= 1.0


def test_interval_is_that_of_the_normal_approximation_for_many_prompts():
    values = numpy.random.default_rng(0).normal(3.0, 2.0, size=2000)
    estimate = bootstrap(values, samples=4000, seed=1)
    half_width = 1.96 * values.std() / 2000**0.5
    assert estimate.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert estimate.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_interval_covers_the_true_mean_about_nineteen_times_in_twenty():
    generator = numpy.random.default_rng(2)
    covered = 0
    for trial in range(400):
        estimate = bootstrap(generator.binomial(1, 0.6, size=100), samples=400, seed=trial)
        covered += estimate.low <= 0.6 <= estimate.high
    # Binomial(400, 0.95) lies within four standard deviations of 380.
    assert 380 - 18 <= covered <= 380 + 18


def test_interval_follows_from_the_seed():
    values = [0.1, 0.9, 0.4, 0.3]
    assert bootstrap(values, samples=200, seed=3) == bootstrap(values, samples=200, seed=3)
    assert bootstrap(values, samples=200, seed=3) != bootstrap(values, samples=200, seed=4)


def test_no_values_are_refused():
    with pytest.raises(AssertionError, match="no values"):
        bootstrap([], samples=10, seed=0)


def test_a_ratio_of_means_by_hand_and_its_interval_by_the_same_resampled_prompts():
    above, below = [1.0, 0.0, 2.0, 5.0], [2.0, 1.0, 4.0, 3.0]
    found = bootstrap_statistic([above, below], ratio, samples=500, seed=3)
    assert found.value == pytest.approx(8 / 10)
    draws = numpy.random.default_rng(3).integers(4, size=(500, 4))
    ratios = [sum(above[i] for i in draw) / sum(below[i] for i in draw) for draw in draws]
    assert (found.low, found.high) == pytest.approx(tuple(numpy.percentile(ratios, [2.5, 97.5])))


def test_a_ratio_that_is_the_same_for_all_prompts_has_no_width():
    found = bootstrap_statistic([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]], ratio, samples=100, seed=0)
    assert found.low == found.value == found.high == 0.5


def test_a_ratio_to_nothing_has_no_interval():
    assert bootstrap_statistic([[1.0, 2.0], [0.0, 0.0]], ratio, samples=10, seed=0) is None
    assert bootstrap_statistic([[1.0, 2.0], [0.0, 1.0]], ratio, samples=100, seed=0) is None, (
        "some resamplings have only zeros"
    )


def test_resamplings_without_a_value_widen_the_interval_and_never_narrow_it():
    generator = numpy.random.default_rng(5)
    values = generator.normal(size=40)
    means = values[numpy.random.default_rng(0).integers(40, size=(1000, 40))].mean(axis=1)
    order = numpy.sort(means)

    def without(unknown):
        def statistic(columns):
            mean = columns[0].mean(axis=-1)
            return numpy.where(unknown(mean), numpy.nan, mean) if len(mean) > 1 else mean

        return bootstrap_statistic([values], statistic, samples=1000, seed=0)

    full = without(lambda mean: mean > numpy.inf)
    assert (full.low, full.high) == tuple(numpy.percentile(means, [2.5, 97.5]))
    # The ten smallest, the ten largest, or ten in the middle: both ends are ten places further out, or where they were.
    for start in (0, 500, 990):
        some = without(lambda mean, start=start: (mean >= order[start]) & (mean <= order[start + 9]))
        assert some.low <= full.low and some.high >= full.high
    assert without(lambda mean: mean >= order[960]) is None, "4% could all be below the interval, or above it"


def test_a_negative_denominator_is_refused():
    with pytest.raises(AssertionError, match="negative denominator"):
        bootstrap_statistic([[1.0], [-1.0]], ratio, samples=10, seed=0)
