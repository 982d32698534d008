"""The one fitted number: where it comes from, and how well it predicts what it was not fitted to."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from planner_study.fit import fit, model_tflops, residual_table, residuals
from planner_study.published import FITTED, PUBLISHED

from megatron_brain.planning.machine import MACHINES

RESULTS = tuple(PUBLISHED.values())


def test_the_efficiency_in_the_code_is_what_the_fit_gives():
    fitted = fit([PUBLISHED[name] for name in FITTED], MACHINES["h100"])
    assert MACHINES["h100"].efficiency == pytest.approx(fitted, abs=5e-5)


def test_results_that_were_not_fitted_are_predicted_within_15_percent():
    errors = residuals(RESULTS, MACHINES["h100"])
    held_out = {name: error for name, error in errors.items() if name not in FITTED}
    assert len(held_out) == 2
    assert max(map(abs, held_out.values())) < 0.15


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_choice_of_what_is_fitted_predicts_the_others(count):
    for chosen in itertools.combinations(RESULTS, count):
        machine = dataclasses.replace(MACHINES["h100"], efficiency=fit(chosen, MACHINES["h100"]))
        others = [result for result in RESULTS if result not in chosen]
        assert max(map(abs, residuals(others, machine).values())) < 0.15


def test_layouts_explain_more_than_a_rate_that_all_share():
    """Fitted to all four, the model is nearer to each than one number of model FLOPs per second would be."""
    machine = dataclasses.replace(MACHINES["h100"], efficiency=fit(RESULTS, MACHINES["h100"]))
    rates = [model_tflops(result) for result in RESULTS]
    mean = (max(rates) * min(rates)) ** 0.5
    shared = max(abs(mean / rate - 1) for rate in rates)
    assert max(map(abs, residuals(RESULTS, machine).values())) < 0.6 * shared


def test_model_flops_of_the_published_results():
    assert [round(model_tflops(result)) for result in RESULTS] == [748, 828, 709, 744]


def test_published_layouts_fill_their_gpus():
    assert [result.layout.world_size for result in RESULTS] == [64, 1024, 32, 8]
    for result in RESULTS:
        layout = result.layout
        assert layout.data * layout.num_micro_batches == result.workload.global_batch_size


def test_the_page_shows_all_residuals():
    page = Path(__file__).parents[3] / "docs" / "planner.md"
    assert residual_table(MACHINES["h100"]) in page.read_text(encoding="utf-8"), (
        "run: PYTHONPATH=tools python -m planner_study.fit"
    )
