"""A kill at any moment loses no checkpoint and does not change the result of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_TIMEOUT_SECONDS = 600


@pytest.mark.parametrize(("stage", "kills"), [("sft", 25), ("brain", 6)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_left_alone(tmp_path, stage, kills):
    """Runs have dropout (sft), stop inside rounds (brain), save in the background, and distribute the optimizer."""
    done = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("faults.py")), "--folder", str(tmp_path / "runs")),
            *("--stage", stage, "--kills", str(kills)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )
    assert done.stdout, done.stderr[-5000:]
    report = json.loads(done.stdout)
    assert report["corrupt"] == [] and report["differences"] == [], report
    assert done.returncode == 0
    assert report["kills"] == kills
    assert report["kills_inside_a_save"] >= kills // 5
    assert report["resumes_that_moved"] >= kills // 2, "the run goes on between kills"
