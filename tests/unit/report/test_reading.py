"""Which runs a report reads, and which it refuses to compare."""

import json
import shutil

import pytest
from helpers.run_folders import rows_of, training_lines, write_run

pytest.importorskip("scipy")

from reports.runs import read_settings

from megatron_brain.errors import ConfigError


def refusal(*places):
    with pytest.raises(ConfigError) as raised:
        read_settings(places)
    return str(raised.value)


def edit(path, **changes):
    told = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (told | changes).items() if value != "remove"}))


def test_runs_are_found_at_any_depth_once_and_grouped_by_setting_in_the_order_of_seeds(tmp_path):
    for setting, seed in (("one", 10), ("two", 0), ("one", 2)):
        write_run(tmp_path, setting, seed, lines=training_lines())
    settings, left_out = read_settings([tmp_path / "baseline" / "one" / "seed2", tmp_path])
    assert [(each.place, each.seeds) for each in settings] == [("baseline/one", (2, 10)), ("baseline/two", (0,))]
    assert left_out == []
    assert [line["iteration"] for line in settings[0].runs[0].lines] == list(range(9))


def test_settings_come_in_the_order_of_the_numbers_in_their_names(tmp_path):
    for setting in ("n16", "n2", "n8"):
        write_run(tmp_path, setting)
    assert [each.place for each in read_settings([tmp_path])[0]] == ["baseline/n2", "baseline/n8", "baseline/n16"]


def test_what_lies_below_a_run_or_a_folder_of_shared_stages_is_no_run(tmp_path):
    folder = write_run(tmp_path)
    (folder / "brain" / "seed7").mkdir(parents=True)
    (tmp_path / "shared" / "seed1").mkdir(parents=True)
    settings, left_out = read_settings([tmp_path])
    assert settings[0].seeds == (0,) and left_out == []


def test_settings_of_two_experiments_with_one_label_have_names_of_their_own(tmp_path):
    write_run(tmp_path, experiment="baseline", label="BRAIn")
    write_run(tmp_path, experiment="methods", label="BRAIn")
    write_run(tmp_path, "dpo", experiment="methods", label="DPO")
    settings, _ = read_settings([tmp_path])
    assert [each.name for each in settings] == ["BRAIn (baseline/one)", "DPO", "BRAIn (methods/one)"]


def test_a_run_that_has_not_ended_is_left_out_and_named(tmp_path):
    write_run(tmp_path, seed=0)
    unfinished = write_run(tmp_path, seed=1, evaluation=False)
    (tmp_path / "baseline" / "one" / "seed2").mkdir()
    settings, left_out = read_settings([tmp_path])
    assert settings[0].seeds == (0,)
    assert left_out[0].startswith(f"{unfinished} has no evaluation.json: the run was not evaluated")
    assert "seed2 has no run.json and no evaluation.json: the run has not ended" in left_out[1]


def test_without_a_finished_run_there_is_no_report(tmp_path):
    folder = write_run(tmp_path, evaluation=False)
    assert f"{folder} has no evaluation.json" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "elsewhere")


def test_other_data_are_refused_with_the_runs_of_each(tmp_path):
    one, other = write_run(tmp_path, seed=0), write_run(tmp_path, seed=1, data_hash="cd" * 32)
    said = refusal(tmp_path)
    assert "hashes of the data" in said and f"{'cd' * 32}: {other}" in said and f"{'ab' * 32}: {one}" in said


def test_another_number_of_prompts_in_a_setting_and_other_choices_of_them_are_refused(tmp_path):
    rows = rows_of([1.0, 2.0, 3.0, 4.0])
    write_run(tmp_path, "whole")
    write_run(tmp_path, seed=0, rows=rows[:3])
    fewer = write_run(tmp_path, seed=1, rows=rows[:2])
    said = refusal(tmp_path)
    assert "numbers of prompts in baseline/one" in said and f"2: {fewer}" in said
    shutil.rmtree(fewer)
    write_run(tmp_path, seed=1, rows=rows[1:])
    assert "choices of prompts in baseline/one" in refusal(tmp_path)


def test_a_setting_with_some_of_the_prompts_is_named_and_its_rows_stand_beside_those_of_the_others(tmp_path):
    rows = rows_of([1.0, 2.0, 3.0, 4.0])
    write_run(tmp_path, "whole", rows=rows)
    write_run(tmp_path, "part", rows=[rows[3], rows[1]])
    (part, whole), notes = read_settings([tmp_path])
    assert [row.get("reward/policy") for row in part.runs[0].rows] == [None, 2.0, None, 4.0]
    assert len(whole.runs[0].answered) == 4
    assert [note.split(":")[0] for note in notes] == ["label of part has 2 of the 4 prompts"]


def test_other_prompts_and_other_references_are_refused(tmp_path):
    write_run(tmp_path, seed=0)
    other = write_run(tmp_path, seed=1, rows=rows_of([1.0, 2.0, 3.0, 4.0], prompts=("a", "b", "c", "d")))
    assert f"{other} has another prompt or reference" in refusal(tmp_path)
    shutil.rmtree(other)
    write_run(tmp_path, seed=1, rows=[row | {"reference": "x"} for row in rows_of([1.0, 2.0, 3.0, 4.0])])
    assert "has another prompt or reference" in refusal(tmp_path)


def test_the_same_seed_twice_is_refused(tmp_path):
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    said = refusal(tmp_path)
    assert "baseline/one has seed 0 more than once" in said and str(one) in said and str(other) in said


@pytest.mark.parametrize(
    ("change", "said"),
    [({"settings": {"lr": 1}}, "settings"), ({"method": "dpo"}, "methods"), ({"label": "another"}, "labels")],
)
def test_seeds_of_a_setting_that_differ_in_more_than_the_seed_are_refused(change, said, tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, **change)
    assert f"different {said} in baseline/one" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["experiment", "setting", "seed", "data_hash", "commands", "settings", "method"])
def test_a_key_of_run_json_that_is_missing_or_of_another_kind_is_named(key, tmp_path):
    folder = write_run(tmp_path)
    edit(folder / "run.json", **{key: "remove"})
    assert f"{key!r} is missing" in refusal(tmp_path)
    edit(folder / "run.json", **{key: None})
    assert f"{key!r} is None" in refusal(tmp_path)


def test_an_evaluation_that_is_no_evaluation_is_named(tmp_path):
    path = write_run(tmp_path) / "evaluation.json"
    whole = path.read_text()
    edit(path, rows="remove")
    assert "rows missing" in refusal(tmp_path)
    path.write_text(whole[:-5])
    assert f"{path}: not JSON" in refusal(tmp_path)
    path.write_text(whole)
    edit(path, num_prompts=5)
    assert "has 4 rows, num_prompts is 5" in refusal(tmp_path)
    path.write_text(whole.replace("0.5,", "NaN,"))
    assert "kl_to_prior of row 0 is nan" in refusal(tmp_path)


def test_an_iteration_twice_in_the_metrics_is_named(tmp_path):
    write_run(tmp_path, lines=[{"iteration": 1}, {"iteration": 2}, {"iteration": 1}])
    assert "metrics.jsonl, line 3" in refusal(tmp_path)
