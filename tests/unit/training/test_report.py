"""Reports of micro-batches add up to one mean over the global batch."""

import math

import pytest
import torch

from megatron_brain.training.report import LossOutput, reduce_reports


def report(loss_sum, count, **options):
    return LossOutput(loss_sum=torch.tensor(loss_sum), count=count, **options)


def test_loss_is_one_mean_over_all_micro_batches_and_not_a_mean_of_means(single):
    metrics = reduce_reports([report(6.0, 1), report(2.0, 3)], single)
    assert metrics == {"loss": 2.0}


def test_means_have_counts_of_their_own(single):
    reports = [
        report(1.0, 1, means={"accuracy": (torch.tensor(1.0), 1), "margin": (torch.tensor(0.5), 2)}),
        report(3.0, 1, means={"margin": (torch.tensor(1.5), 2), "accuracy": (torch.tensor(0.0), 3)}),
    ]
    metrics = reduce_reports(reports, single, mean_names=("accuracy", "margin"))
    assert metrics == {"loss": 2.0, "accuracy": 0.25, "margin": 0.5}


def test_maxima_are_the_largest_even_below_zero(single):
    reports = [report(1.0, 1, maxima={"ratio": torch.tensor(value)}) for value in (-3.0, -2.0, -5.0)]
    assert reduce_reports(reports, single, max_names=("ratio",))["ratio"] == -2.0


def test_sums_are_taken_in_float64(single):
    reports = [report(2.0**25, 1), *[report(1.0, 0) for _ in range(8)]]
    assert reduce_reports(reports, single)["loss"] == 2.0**25 + 8


def test_a_loss_that_is_not_finite_shows(single):
    assert math.isnan(reduce_reports([report(1.0, 1), report(math.nan, 1)], single)["loss"])


def test_values_that_need_gradients_are_read(single):
    loss = torch.tensor(3.0, requires_grad=True) * 2
    assert reduce_reports([LossOutput(loss_sum=loss, count=2)], single) == {"loss": 3.0}


def test_a_metric_that_was_not_declared_fails(single):
    with pytest.raises(AssertionError, match="surprise"):
        reduce_reports([report(1.0, 1, means={"surprise": (torch.tensor(1.0), 1)})], single)
