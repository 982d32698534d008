"""What the runner of the experiments records of a run and of its steps, with stub commands."""

import dataclasses
import json

import pytest


def run_plan(stub, evaluation="{}", iterations=3):
    brain, result = "stub/x/seed1/brain", "stub/x/seed1/evaluation.json"
    data = stub.write("shared/data", "records", digests=(stub.work / "shared/data",))
    evaluate = stub.write(result, evaluation, needs=[brain], loads=(brain,))
    return stub.plan(
        data, stub.train(brain, iterations, minutes=0.0, needs=["shared/data"]), evaluate, runs=[("x", [brain, result])]
    )


def test_a_finished_run_has_its_record_metrics_and_evaluation_and_no_checkpoints(stub, capsys):
    plan = run_plan(stub)
    stub.run(plan)
    folder = stub.work / "stub" / "x" / "seed1"
    record = json.loads((folder / "run.json").read_text())
    expected = {
        "experiment": "stub",
        "setting": "x",
        "label": "X",
        "method": "brain",
        "seed": 1,
        "settings": {"lr": 0.5},
    }
    assert expected.items() <= record.items()
    assert record["commands"] == [list(step.command) for step in plan.steps.values()]
    assert record["started"] <= record["ended"] and record["seconds"] > 0
    assert {"python", "megatron_brain", "torch", "megatron-core", "transformers", "commit"} == set(record["versions"])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert (folder / "evaluation.json").read_text() == "{}"
    assert not list((folder / "brain").glob("iter_*")) and "removed its checkpoints" in capsys.readouterr().out
    assert stub.run(plan).left == []


def test_a_run_has_the_versions_with_which_its_steps_began_went_on_and_ended(stub, modules, monkeypatch):
    folder = stub.work / "stub/x/seed1"
    commit = [{"commit": "first"}]
    monkeypatch.setattr(modules.state, "versions", lambda: commit[-1])
    plan, slow = run_plan(stub, iterations=300), stub.slow("stub/x/seed1/brain")
    assert stub.run(plan, minutes=0.03).left
    slow.unlink()
    commit.append({"commit": "second"})
    assert stub.run(plan).left == []
    # The versions at the time of writing do not count.
    (folder / "run.json").unlink()
    commit.append({"commit": "third"})
    stub.run(plan)
    assert json.loads((folder / "run.json").read_text())["versions"] == {"commit": "first, second"}


def test_another_label_method_or_setting_of_a_finished_run_is_recorded_without_running_it_again(stub):
    plan = run_plan(stub)
    stub.run(plan)
    calls, (run,) = stub.calls(), plan.runs
    setting = dataclasses.replace(run.setting, label="Another", method="other")
    renamed = dataclasses.replace(plan, runs=[dataclasses.replace(run, setting=setting, flags={"lr": 0.25})])
    stub.run(renamed)
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["label"], record["method"], record["settings"]) == ("Another", "other", {"lr": 0.25})
    assert stub.calls() == calls


def test_the_hash_of_the_data_is_that_of_their_checksums(stub, modules):
    stub.run(run_plan(stub))
    record = json.loads((stub.work / "stub/x/seed1/run.json").read_text())
    digest = modules.steps.file_hash(stub.work / "shared" / "data")
    assert record["data_hash"] == modules.records.hash_of({"shared/data": digest})
    assert modules.records.hash_of({"shared/data": "0"}) != record["data_hash"]


@pytest.mark.parametrize("asks", ["command line", "experiment"])
def test_checkpoints_stay_if_asked(stub, asks):
    plan = run_plan(stub)
    experiment = dataclasses.replace(plan.experiment, keep_checkpoints=asks == "experiment")
    stub.run(dataclasses.replace(plan, experiment=experiment), keep_checkpoints=asks == "command line")
    assert list((stub.work / "stub/x/seed1/brain").glob("iter_*"))


def test_a_policy_whose_checkpoint_was_removed_is_trained_again_where_it_is_evaluated_in_another_way(stub):
    stub.run(run_plan(stub))
    assert stub.run(run_plan(stub, "[]"), rerun_changed=True).left == []
    metrics = (stub.work / "stub/x/seed1/brain/metrics.jsonl").read_text()
    assert len(metrics.splitlines()) == 3
    log = (stub.work / "log/stub/x/seed1/brain.log").read_text()
    assert log.count("begins after 0\n") == 2
    assert (stub.work / "stub/x/seed1/evaluation.json").read_text() == "[]"


def test_other_data_change_all_that_was_made_of_them(stub):
    plan = run_plan(stub)
    stub.run(plan)
    # The command is the same, but what it fetches now is another text.
    (stub.work / "state/shared/data.json").unlink()
    (stub.work / "shared/data").unlink()
    step = plan.steps["shared/data"]
    state = stub.modules.state.State(stub.work)
    state.begin(step)
    step.outputs[0].write_text("other records")
    state.finish(step)
    assert stub.conditions(plan) == dict.fromkeys(plan.steps, "changed") | {"shared/data": "done"}


def test_the_log_has_the_machine_time_and_the_cpu_time_of_every_command(stub, modules):
    busy = "import sys, time; open(sys.argv[1], 'w')\nwhile time.process_time() < 0.5: pass"
    a = stub.script("a", busy, stub.work / "a", outputs=["a"])
    plan = stub.plan(a, stub.write("both", "1", slots=2))
    stub.run(plan)
    lines = [json.loads(line) for line in (stub.work / "log" / "steps.jsonl").read_text().splitlines()]
    share = {line["step"]: line["machine_seconds"] / line["seconds"] for line in lines}
    assert share == {"a": pytest.approx(0.5, abs=0.1), "both": 1.0}
    assert 0.5 <= lines[0]["cpu_seconds"] < 1.5 and lines[1]["cpu_seconds"] < 0.5
    assert [line["outcome"] for line in lines] == ["finished", "finished"]
