"""Numbers along training and along a flag, by hand."""

import numpy
import pytest
from helpers.run_folders import training_lines, write_run

pytest.importorskip("scipy")

from reports.curves import sweeps, training_curves
from reports.runs import read_settings

REWARD = "validation/reward_mean"


def curves(work, *keys):
    return training_curves(read_settings([work])[0], keys)


def test_a_curve_has_the_validations_of_every_seed(tmp_path):
    write_run(tmp_path, seed=0, lines=training_lines())
    write_run(tmp_path, seed=1, lines=training_lines(shift=0.5))
    (curve,), notes = curves(tmp_path, REWARD)
    assert curve.iterations.tolist() == [0, 4, 8] and notes == []
    numpy.testing.assert_allclose(curve.values[REWARD], [[0.0, 0.4, 0.8], [0.5, 0.9, 1.3]])


def test_validations_that_not_all_seeds_have_are_left_out_and_named(tmp_path):
    write_run(tmp_path, seed=0, lines=training_lines())
    write_run(tmp_path, seed=1, lines=training_lines()[:6])
    (curve,), notes = curves(tmp_path, REWARD)
    assert curve.iterations.tolist() == [0, 4]
    assert notes == [f"label of one: not all seeds have {REWARD} at 8; left out"]


def test_settings_without_the_metrics_are_named(tmp_path):
    write_run(tmp_path, "a", lines=training_lines())
    write_run(tmp_path, "b")
    write_run(tmp_path, "c", lines=[{"iteration": 1, "loss": 1.0}])
    (curve,), notes = curves(tmp_path, REWARD)
    assert curve.name == "label of a"
    assert "no metrics.jsonl of seed 0" in notes[0] and notes[1].startswith("label of c has no iteration where all")


def found_sweeps(work):
    return {
        flag: [(line.title, line.points) for line in lines] for flag, lines in sweeps(read_settings([work])[0]).items()
    }


def test_settings_whose_names_differ_in_a_flag_s_number_are_a_series_in_the_order_of_the_numbers(tmp_path):
    for n in (16, 2):
        for kind in ("", "-equal-compute"):
            told = {"samples_per_prompt": n, "global_batch_size": 32 // n}
            write_run(tmp_path, f"n{n}{kind}", label=f"n = {n}{kind}", settings=told)
    write_run(tmp_path, "n8", label="n = 8", settings={"baseline": "none"})
    assert found_sweeps(tmp_path) == {
        "samples_per_prompt": [
            ("n = …", [(2.0, "n = 2"), (8.0, "n = 8"), (16.0, "n = 16")]),
            ("n = …-equal-compute", [(2.0, "n = 2-equal-compute"), (16.0, "n = 16-equal-compute")]),
        ]
    }
    (line, _) = sweeps(read_settings([tmp_path])[0])["samples_per_prompt"]
    assert line.changing == ["global_batch_size"]


def test_a_number_in_a_name_that_is_no_flag_s_makes_no_series(tmp_path):
    write_run(tmp_path, "trial1", settings={"lr": "1e-5"})
    write_run(tmp_path, "trial2", settings={"lr": "2e-5"})
    write_run(tmp_path, "k8", settings={"refresh_interval": 8, "on": True})
    write_run(tmp_path, "k32", settings={"refresh_interval": 16, "on": True})
    assert found_sweeps(tmp_path) == {}
