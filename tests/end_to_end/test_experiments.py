"""Real experiments on the Debian task, which need package registries and time.

    RUN_EXPERIMENTS=smoke python -m pytest tests/end_to_end/test_experiments.py      some minutes
    RUN_EXPERIMENTS=reduced python -m pytest tests/end_to_end/test_experiments.py    half an hour

EXPERIMENTS_WORK=DIR names a folder of results to go on with.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.experiments import FOLDER

LEFT = 3


def asked(name):
    return pytest.mark.skipif(os.environ.get("RUN_EXPERIMENTS") != name, reason=f"RUN_EXPERIMENTS={name} runs it")


@pytest.fixture
def work(tmp_path) -> Path:
    return Path(os.environ.get("EXPERIMENTS_WORK", tmp_path))


def start(name, work, *options) -> subprocess.Popen:
    command = [sys.executable, str(FOLDER / "run.py"), f"{name}.yaml", "--work", str(work), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def evaluation_of(work, name, setting) -> dict:
    folder = work / name / setting / "seed1"
    record = json.loads((folder / "run.json").read_text())
    assert (record["experiment"], record["setting"], record["seed"]) == (name, setting, 1)
    assert any("validation/posterior_kl_to_policy" in line for line in (folder / "metrics.jsonl").open())
    return json.loads((folder / "evaluation.json").read_text())


@asked("smoke")
def test_a_chain_that_is_stopped_in_training_goes_on_and_has_all_results(work):
    """The stop comes when a run has saved a checkpoint, so the rest of it is resumed."""
    runner = start("smoke", work)
    while runner.poll() is None and not list((work / "smoke").glob("*/seed1/brain/latest_checkpointed_iteration.txt")):
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    output = runner.communicate(timeout=300)[0]
    assert runner.returncode == LEFT and "left:" in output, output
    rest = start("smoke", work)
    output = rest.communicate(timeout=600)[0]
    assert rest.returncode == 0, output
    for setting in ("brain", "dpo"):
        evaluation = evaluation_of(work, "smoke", setting)
        assert {"posterior/kl_to_policy", "reward/plain", "win_rate/judge/policy_vs_baseline"} <= set(
            evaluation["metrics"]
        )
        assert not list((work / "smoke" / setting / "seed1" / "brain").glob("iter_*"))
    again = start("smoke", work)
    assert "0 of" in again.communicate(timeout=60)[0] and again.returncode == 0


@asked("reduced")
def test_three_baselines_of_a_real_model_take_half_an_hour(work):
    began = time.monotonic()
    runner = start("reduced", work)
    output = runner.communicate(timeout=3600)[0]
    assert runner.returncode == 0, output
    assert time.monotonic() - began < 1800
    for setting in ("self-normalized", "unnormalized", "none"):
        assert evaluation_of(work, "reduced", setting)["num_prompts"] == 100
