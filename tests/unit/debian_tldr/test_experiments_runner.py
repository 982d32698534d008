"""The runner of the experiments with stub commands: what it runs, skips, resumes, refuses and records."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.experiments import FOLDER


def wait_until(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def trains(stub) -> bool:
    """Whether the step `brain` has logged a line."""
    metrics = stub.work / "brain" / "metrics.jsonl"
    return metrics.exists() and bool(metrics.read_text())


def stop_when_it_trains(stub):
    """Send SIGTERM to this process as soon as the step `brain` trains."""

    def stop():
        wait_until(lambda: trains(stub))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()


def test_steps_run_once_in_the_order_of_their_needs_and_a_second_session_has_nothing_to_do(stub):
    plan = stub.plan(stub.write("a", "1"), stub.write("b", "2", needs=["a"]), stub.write("c", "3", needs=["b"]))
    assert stub.run(plan).left == []
    assert stub.calls() == ["a", "b", "c"]
    assert stub.run(plan).left == []
    assert stub.calls() == ["a", "b", "c"]


def test_as_many_steps_run_at_one_time_as_there_are_jobs_and_one_of_two_processes_runs_alone(stub):
    """a and b each wait for the start of the other. Then b goes on for a while, in which `both` must not start."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "own, other = Path(sys.argv[1]), Path(sys.argv[2])\nprint(time.time())\n"
        "own.with_suffix('.started').touch()\n"
        "while not other.with_suffix('.started').exists(): time.sleep(0.01)\n"
        "if own.name == 'b': time.sleep(0.5)\n"
        "own.write_text(str(time.time()))"
    )
    others = {"a": "b", "b": "a", "both": "both"}
    steps = [
        stub.script(name, code, stub.work / name, stub.work / other, outputs=[name], slots=1 + (name == "both"))
        for name, other in others.items()
    ]
    assert stub.run(stub.plan(*steps)).left == []
    started = float((stub.work / "log" / "both.log").read_text().splitlines()[-1])
    assert started >= max(float((stub.work / name).read_text()) for name in "ab")


def test_a_failing_step_names_its_log_and_stops_only_what_needs_it(stub, capsys):
    fails = stub.script("bad", "print('the reason'); raise SystemExit(7)", outputs=["bad"])
    plan = stub.plan(fails, stub.write("after", "1", needs=["bad"]), stub.write("other", "1"))
    outcome = stub.run(plan)
    assert outcome.left == ["bad", "after"] and list(outcome.failed) == ["bad"]
    log = stub.work / "log" / "bad.log"
    assert "status 7" in outcome.failed["bad"] and str(log) in outcome.failed["bad"] and "the reason" in log.read_text()
    assert "the reason" in capsys.readouterr().out
    assert stub.calls() == ["other"]


def test_a_command_that_ends_well_without_its_outputs_has_failed(stub):
    outcome = stub.run(stub.plan(stub.script("empty", "", outputs=["empty.json"])))
    assert outcome.left == ["empty"] and "without" in outcome.failed["empty"]
    assert stub.modules.state.State(stub.work).marker("empty")["done"] is False


def compared(stub, ending):
    """A plan of two candidates, of which the second ends as `ending` says, and a step that compares them."""
    bad = stub.script("bad", f"open({str(stub.work / 'tries')!r}, 'a').write('x')\n{ending}", outputs=["out"])
    bad = dataclasses.replace(bad, may_diverge=True)
    choose = stub.write("chosen", "1", needs=["good", "bad"], takes_diverged=True)
    return stub.plan(stub.write("good", "1", may_diverge=True), bad, choose, stub.write("uses", "1", needs=["bad"]))


def test_a_candidate_that_diverged_is_over_and_blocks_neither_the_choice_nor_the_next_session(stub):
    plan = compared(stub, "raise FloatingPointError('loss nan')")
    outcome = stub.run(plan)
    assert not outcome.failed and outcome.left == ["uses"]
    assert stub.run(plan).left == ["uses"] and (stub.work / "tries").read_text() == "x"
    assert stub.calls() == ["good", "chosen"]
    assert stub.conditions(plan)["bad"] == "diverged"


@pytest.mark.parametrize(
    "ending",
    ["raise OSError('disk full')", "print('FloatingPointError', flush=True); import os; os.kill(os.getpid(), 9)"],
)
def test_a_candidate_that_failed_for_another_reason_is_no_result(stub, ending):
    outcome = stub.run(compared(stub, ending))
    assert list(outcome.failed) == ["bad"] and outcome.left == ["bad", "chosen", "uses"]


def test_a_changed_command_is_refused_and_says_what_changed_and_a_rerun_makes_all_that_depends_on_it_anew(stub):
    def plan(text):
        return stub.plan(stub.write("a", text), stub.write("b", "2", needs=["a"]), stub.write("other", "3"))

    stub.run(plan("old"))
    with pytest.raises(
        stub.modules.user_errors.UserError, match=r"a \(and 1 more\).* had old .* has new.*--rerun-changed"
    ):
        stub.run(plan("new"))
    assert (stub.work / "a").read_text() == "old"
    stub.run(plan("new"), rerun_changed=True)
    assert (stub.work / "a").read_text() == "new"
    assert stub.calls()[3:] == ["a", "b"]


def test_a_changed_settings_file_is_a_changed_step(stub, modules, tmp_path, monkeypatch):
    monkeypatch.setattr(modules.steps, "ROOT", tmp_path)
    (tmp_path / "brain.yaml").write_text("lr: 1")
    plan = stub.plan(stub.write("a", "1", reads=(tmp_path / "brain.yaml",)))
    stub.run(plan)
    (tmp_path / "brain.yaml").write_text("lr: 2")
    with pytest.raises(modules.user_errors.UserError, match=r"brain.yaml had another content"):
        stub.run(plan)


def test_another_version_of_the_package_is_a_changed_step(stub, modules, monkeypatch):
    plan = stub.plan(stub.write("a", "1"))
    stub.run(plan)
    monkeypatch.setattr(modules.steps.megatron_brain, "__version__", "99")
    with pytest.raises(modules.user_errors.UserError, match=r"megatron_brain was .* and is 99"):
        stub.run(plan)


def test_an_interrupted_step_of_another_configuration_is_not_gone_on_with(stub):
    stub.slow("brain")
    stop_when_it_trains(stub)
    outcome = stub.run(stub.plan(stub.train("brain", 1000)))
    assert outcome.left == ["brain"] and not outcome.failed
    changed = stub.plan(stub.train("brain", 3))
    with pytest.raises(stub.modules.user_errors.UserError, match="brain was made with another configuration"):
        stub.run(changed)
    stub.run(changed, rerun_changed=True)
    assert len((stub.work / "brain" / "metrics.jsonl").read_text().splitlines()) == 3


def test_max_minutes_stops_a_stage_which_saves_and_the_next_session_goes_on_from_there(stub, capsys):
    plan = stub.plan(stub.train("brain", 300, minutes=0.0), stub.write("after", "1", needs=["brain"]))
    slow = stub.slow("brain")
    outcome = stub.run(plan, minutes=0.03)
    slow.unlink()
    saved = int((stub.work / "brain" / "latest_checkpointed_iteration.txt").read_text())
    assert outcome.left == ["brain", "after"] and not outcome.failed and 0 < saved < 300
    assert "--max-minutes is over" in capsys.readouterr().out
    assert stub.conditions(plan)["brain"] == "begun"
    assert stub.run(plan).left == []
    lines = (stub.work / "brain" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 301))
    assert f"begins after {saved}\n" in (stub.work / "log" / "brain.log").read_text()


def test_a_step_that_cannot_be_interrupted_is_not_started_with_too_little_time_left(stub):
    plan = stub.plan(stub.write("long", "1", minutes=5.0), stub.write("short", "1", minutes=0.0))
    assert stub.run(plan, minutes=1).left == ["long"]
    assert stub.calls() == ["short"]


def test_a_signal_stops_the_steps_that_run_and_starts_no_more(stub):
    plan = stub.plan(stub.train("brain", 1000), stub.write("after", "1", needs=["brain"]))
    stub.slow("brain")
    stop_when_it_trains(stub)
    outcome = stub.run(plan)
    assert outcome.left == ["brain", "after"] and not outcome.failed
    assert (stub.work / "brain" / "latest_checkpointed_iteration.txt").exists()


def test_a_signal_prints_nothing_while_another_print_may_be_under_way(stub, modules, monkeypatch):
    told = []
    executor = modules.execute.Executor(stub.plan(), modules.state.State(stub.work), jobs=1, lock=0)
    monkeypatch.setattr(modules.execute, "say", told.append)
    executor._on_signal(signal.SIGTERM, None)
    assert told == []
    executor._loop()
    assert told == ["SIGTERM: asks nothing to save and end"]


def test_a_stage_that_somebody_else_stopped_is_not_taken_for_finished(stub):
    code = "import sys; from pathlib import Path; p = Path(sys.argv[1]); p.mkdir(); " + (
        "(p / 'latest_checkpointed_iteration.txt').write_text('3')"
    )
    folder = stub.work / "brain"
    outputs = [folder / "latest_checkpointed_iteration.txt"]
    step = stub.script("brain", code, folder, outputs=outputs, checkpoint=folder, iterations=5, resumes=True)
    outcome = stub.run(stub.plan(step))
    assert outcome.left == ["brain"] and not outcome.failed


def test_the_lock_is_held_by_a_step_whose_runner_was_killed(stub, modules):
    code = (
        f"import sys; sys.path[:0] = {[str(FOLDER.parents[2] / 'tests')]!r}\n"
        "from helpers.experiments import StubPlans, importable\n"
        "from pathlib import Path\n"
        "with importable() as modules:\n"
        f"    stub = StubPlans(modules, Path({str(stub.work)!r}))\n"
        "    stub.run(stub.plan(stub.train('brain', 1000)))\n"
    )
    slow = stub.slow("brain")
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_until(lambda: trains(stub))
    runner.kill()
    runner.wait()
    plan = stub.plan(stub.train("brain", 1000))
    try:
        assert modules.lock.is_locked(stub.work)
        with pytest.raises(modules.user_errors.UserError, match=f"in use by process {runner.pid} on .*--work"):
            stub.run(plan)
    finally:
        (child,) = children_with(str(stub.work / "brain"))
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: not modules.lock.is_locked(stub.work))
    slow.unlink()
    # Nothing was saved, so the step begins anew.
    assert stub.run(plan).left == []
    assert len((stub.work / "brain" / "metrics.jsonl").read_text().splitlines()) == 1000


def children_with(word: str) -> list[int]:
    """Processes that have the word on their command line as an argument of its own."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                words = open(f"/proc/{entry}/cmdline", "rb").read().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if word in words:
                found.append(int(entry))
    return found


@pytest.fixture
def session(stub, modules, monkeypatch):
    """Runs the script with a stub plan and options; returns its exit status."""

    def run(plan, *options):
        monkeypatch.setattr(modules.run, "make_plan", lambda *_, **__: plan)
        monkeypatch.setattr(sys, "argv", ["run.py", "stub.yaml", "--work", str(stub.work), *options])
        try:
            modules.run.main()
        except SystemExit as end:
            return end.code
        return None

    return run


def test_the_exit_status_tells_whether_all_is_done_failed_or_left(stub, session, capsys):
    good, bad = stub.write("good", "1"), stub.script("bad", "raise SystemExit(1)", outputs=["bad"])
    assert session(stub.plan(stub.write("good", "1", minutes=5.0)), "--max-minutes", "1") == 3
    assert "left: 1 steps, about 2 minutes: good" in capsys.readouterr().out
    assert session(stub.plan(good)) == 0
    assert "all 1 steps are done" in capsys.readouterr().out
    assert session(stub.plan(good, bad)) == 1
    assert "FAILED: bad: ended with status 1; its output is in" in capsys.readouterr().out
    sessions = [json.loads(line) for line in (stub.work / "log" / "sessions.jsonl").read_text().splitlines()]
    assert [one["status"] for one in sessions] == [3, 0, 1]
    # The budget is counted by the clock: a lone step has one of two slots, but the machine for itself.
    (stub.work / "log" / "sessions.jsonl").write_text('{"seconds": 1800}\n{"seconds": 5400}\n')
    session(stub.plan(good), "--status")
    assert "wall time of all ended sessions" in (shown := capsys.readouterr().out) and "2.00 hours" in shown


def test_status_and_dry_run_show_what_is_done_and_left_and_run_nothing(stub, session, capsys):
    plan = stub.plan(stub.write("x/a", "1"), stub.write("x/b", "it's", needs=["x/a"]), stub.write("y/c", "3"))
    session(stub.plan(stub.write("x/a", "1")))
    capsys.readouterr()
    assert session(plan, "--dry-run") is None
    shown = capsys.readouterr().out
    assert "# x/b, about 0.0 minutes\npython -c" in shown and """'it'"'"'s'""" in shown
    assert session(plan, "--status") is None
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[1][:3] == ["x", "partly", "done"] and table[1][-1] == "b"
    assert table[2][:2] == ["y", "left"] and table[2][-1] == "c"
    assert stub.calls() == ["x/a"]


def test_the_time_left_follows_how_long_finished_steps_of_the_kind_took(stub, modules):
    def step(name, **more):
        return stub.write(name, "1", minutes=10.0, kind="brain", **more)

    first, rest = step("a"), [step("b"), step("c", slots=2)]
    stub.run(stub.plan(first))
    state, path = modules.state.State(stub.work), stub.work / "state" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1200.0}))
    plan = stub.plan(first, *rest)
    # Steps of the kind took twice as long as expected. One job of two has half of the machine, two processes all of it.
    assert modules.status.minutes_left(plan, state, state.conditions(plan.steps), jobs=2) == pytest.approx(20 / 2 + 20)
