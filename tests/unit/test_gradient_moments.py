"""The moments of the gradient study against an enumeration of all groups, in a world of four responses.

The policy is a table of logits, so the gradient of log q(y) is `onehot(y) - q`.
"""

import itertools
import math

import numpy
import pytest
import torch
from mechanism import estimators
from mechanism.summary import summarize

PRIOR, REWARDS = numpy.array([0.4, 0.3, 0.2, 0.1]), numpy.array([0.0, 1.0, -1.0, 0.5])
PROPOSAL, POLICY = numpy.array([0.3, 0.3, 0.2, 0.2]), numpy.array([0.2, 0.1, 0.3, 0.4])
TEMPERATURE = 0.7
POSTERIOR = PRIOR * numpy.exp(REWARDS / TEMPERATURE) / (PRIOR * numpy.exp(REWARDS / TEMPERATURE)).sum()
SIZES = (2, 4)


def weights(baseline, drawn, policy):
    """Of the samples of one group, from ratios of probabilities."""
    posterior, ratio = (POSTERIOR / PROPOSAL)[drawn], (policy / PROPOSAL)[drawn]
    subtracted = {"self-normalized": ratio / ratio.sum(), "unnormalized": ratio / len(drawn), "none": 0.0}
    return posterior / posterior.sum() - subtracted[baseline]


def enumerated(baseline, n, policy):
    """MOMENTS by a sum over all groups."""
    slopes = numpy.eye(4) - policy
    true = POSTERIOR @ slopes
    mean, squared = numpy.zeros(4), 0.0
    for drawn in map(list, itertools.product(range(4), repeat=n)):
        gradient = weights(baseline, drawn, policy) @ slopes[drawn]
        mean += PROPOSAL[drawn].prod() * gradient
        squared += PROPOSAL[drawn].prod() * gradient @ gradient
    return {
        "squared": squared,
        "variance": squared - mean @ mean,
        "bias_squared": (mean - true) @ (mean - true),
        "along_reference": mean @ true,
        "reference_squared": true @ true,
    }


def measured(policy, *, pools=200, samples=32):
    """MOMENTS of many pools, so small that what is wrong in the order of 1/N shows."""
    generator = numpy.random.default_rng(0)
    found = []
    for seed in range(pools):
        drawn = generator.choice(4, size=samples, p=PROPOSAL)
        log_prior, rewards, log_proposal, log_policy = (
            torch.from_numpy(each[drawn])
            for each in (numpy.log(PRIOR), REWARDS, numpy.log(PROPOSAL), numpy.log(policy))
        )
        slopes = torch.from_numpy((numpy.eye(4) - policy)[drawn])
        found.append(
            estimators.measure(
                estimators.Pool(log_prior=log_prior, reward=rewards, log_proposal=log_proposal),
                log_policy,
                slopes @ slopes.t(),
                sizes=SIZES,
                reward_temperature=TEMPERATURE,
                splits=1,
                permutations=2,
                seed=seed,
            )
        )
    return found


def misses(found, policy):
    """The moments whose mean over pools is more than three and a half standard errors from the enumeration."""
    missed = []
    for baseline, n in itertools.product(estimators.BASELINES, SIZES):
        for name, exact in enumerated(baseline, n, policy).items():
            values = numpy.array([each[baseline, n][name] for each in found])
            error = values.std(ddof=1) / math.sqrt(len(values))
            if abs(values.mean() - exact) > 3.5 * error + 1e-9:
                missed.append((baseline, n, name, values.mean(), exact, error))
    return missed


@pytest.mark.parametrize("policy", [POLICY, PROPOSAL], ids=["drifted", "proposal"])
def test_moments_are_those_of_the_enumeration(policy):
    assert misses(measured(policy), policy) == []


def without_proposal(log_policy, log_proposal, log_alpha, *, baseline):
    """Weights whose beta forgets that the samples are the proposal's."""
    beta = 0.0 if baseline == "none" else log_policy.softmax(0)
    return -(log_alpha.exp() - beta)


def test_a_wrong_weight_is_noticed(monkeypatch):
    monkeypatch.setattr(estimators, "brain_loss_gradient", without_proposal)
    missed = {(baseline, name) for baseline, _, name, *_ in misses(measured(POLICY), POLICY)}
    assert {("self-normalized", "variance"), ("unnormalized", "bias_squared")} <= missed
    assert not any(baseline == "none" for baseline, _ in missed)


def test_unnormalised_is_self_normalised_where_the_policy_is_the_proposal():
    for pool in measured(PROPOSAL, pools=2):
        for n in SIZES:
            for name, value in pool["unnormalized", n].items():
                assert value == pytest.approx(pool["self-normalized", n][name], abs=1e-12)


def test_enumerated_bias_without_a_baseline_is_that_of_unnormalised_ratios():
    # So figures of the study that differ between the two do so by noise.
    for n in SIZES:
        unnormalized, none = (enumerated(baseline, n, POLICY) for baseline in ("unnormalized", "none"))
        assert unnormalized["bias_squared"] == pytest.approx(none["bias_squared"])
        assert unnormalized["variance"] != pytest.approx(none["variance"], rel=0.05)


def test_a_large_group_is_corrected_by_the_jackknife():
    ratios = (POSTERIOR / PROPOSAL)[numpy.random.default_rng(1).choice(4, size=14, p=PROPOSAL)]
    left_out = []
    for place in range(14):
        rest = ratios.copy()
        rest[place] = 0.0
        left_out.append(rest / rest.sum())
    log_weights = torch.from_numpy(ratios).log().log_softmax(0)
    found = estimators.large_group(log_weights, torch.arange(3, 17), 20)
    assert found[:3].tolist() == [0.0] * 3 == found[17:].tolist()
    numpy.testing.assert_allclose(found[3:17], 14 * ratios / ratios.sum() - 13 * numpy.mean(left_out, axis=0))


def test_a_large_group_is_finite_where_one_sample_has_all_weight():
    found = estimators.large_group(torch.tensor([0.0, -50.0, -100.0]).double().log_softmax(0), torch.arange(3), 3)
    # Without the first sample the second has all weight.
    torch.testing.assert_close(found, torch.tensor([3 - 2 * 2 / 3, -2 / 3, 0.0]).double())


def test_the_multiple_of_zero_that_is_subtracted_comes_from_the_other_half():
    squares = torch.tensor([1.0, 1.0, 4.0, 4.0])
    zeros = [torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])]
    # The second half of each estimate is uncorrelated with its zero.
    pair = [2 * zeros[0] + zeros[0].abs(), 5 * zeros[1] + zeros[1].abs()]
    found = estimators._less_zero(pair, zeros, squares)
    assert [each.tolist() for each in found] == [[-2.0, 4.0, 0.0, 0.0], [0.0, 0.0, 4.0, -2.0]]


def test_drift_by_hand():
    found = estimators.drift(torch.tensor([0.0, math.log(3.0)]).double(), torch.zeros(2).double())
    assert found == {
        "kl_from_proposal": pytest.approx(-math.log(3) / 2),
        # beta is 1/4, 3/4, and the mean ratio is 2.
        "kl_to_proposal": pytest.approx(0.75 * math.log(3) - math.log(2)),
        "max_ratio": pytest.approx(3.0),
        "ess_beta": pytest.approx(1 / (1 / 16 + 9 / 16) / 2),
    }


def moments(*, scale=1.0, **changed):
    """Of one prompt: the same for each baseline, but what is changed for `none`."""
    plain = {"squared": 4.0, "variance": 3.0, "bias_squared": 1.0, "along_reference": 2.0, "reference_squared": 4.0}
    return {
        (baseline, 8): {
            name: scale * value for name, value in ({**plain, **changed} if baseline == "none" else plain).items()
        }
        for baseline in estimators.BASELINES
    }


def test_figures_are_ratios_of_sums_over_prompts():
    rows = summarize([moments(), moments(scale=3.0, variance=11.0)], bootstrap_samples=200, seed=0)
    by_baseline = {row["baseline"]: {name: row[name] for name in row if name not in ("baseline", "n")} for row in rows}
    values = {name: {key: each["value"] for key, each in row.items()} for name, row in by_baseline.items()}
    assert values["self-normalized"] == pytest.approx(
        {"bias": 0.5, "variance": 0.75, "mean_squared_error": 1.0, "cosine": 0.5, "mean_squared_error_ratio": 1.0}
    )
    # The sums of `none` are 3 + 33 for the variance, 1 + 3 for the bias, 4 + 12 for the reference.
    assert values["none"] == pytest.approx(
        {"bias": 0.5, "variance": 2.25, "mean_squared_error": 2.5, "cosine": 0.5, "mean_squared_error_ratio": 2.5}
    )
    assert (by_baseline["none"]["variance"]["low"], by_baseline["none"]["variance"]["high"]) == (0.75, 2.75)


def test_nothing_is_relative_to_a_reference_that_is_lost_in_its_noise():
    rows = summarize([moments(reference_squared=-1.0)], bootstrap_samples=10, seed=0)
    (none,) = (row for row in rows if row["baseline"] == "none")
    assert none["variance"] == none["cosine"] == {"value": None, "low": None, "high": None}
    assert none["mean_squared_error_ratio"]["value"] == 1.0


def test_an_end_of_an_interval_is_open_where_draws_lose_the_reference():
    rows = summarize([moments(), moments(reference_squared=-3.0)], bootstrap_samples=200, seed=0)
    (none,) = (row for row in rows if row["baseline"] == "none")
    assert none["bias"]["high"] is None and none["bias"]["low"] == 0.5
