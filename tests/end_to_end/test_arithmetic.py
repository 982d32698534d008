"""The example of arithmetic, a few steps of it: a rule is the only reward."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_runs_from_problems_to_shares_of_right_answers(tmp_path):
    script = (ROOT / "examples/arithmetic/run.sh").read_text(encoding="utf-8")
    enters = "source tools/environment.sh examples\n"
    assert enters in script
    # The packages of this environment are there already, and nothing is installed by a test.
    script = script.replace(enters, "").replace('"$(dirname "${BASH_SOURCE[0]}")/../.."', str(ROOT))
    (tmp_path / "run.sh").write_text(script, encoding="utf-8")
    python = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", tmp_path / "run.sh", "--smoke"],
        env={**os.environ, "WORK": str(tmp_path / "work"), "PATH": f"{python}:{os.environ['PATH']}"}
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "baseline 0." in done.stdout.splitlines()[-1]
    train, test = (
        {record["id"]: record for record in map(json.loads, (tmp_path / "work/data" / f"{name}.jsonl").open())}
        for name in ("train", "test")
    )
    assert len(train) == 80 and len(test) == 20 and not train.keys() & test.keys()
    rollouts = [json.loads(line) for line in (tmp_path / "work/rollouts/round_0000.jsonl").open()]
    assert len(rollouts) == 80
    for rollout in rollouts:
        right = str(train[rollout["id"]]["answer"])
        for response in rollout["responses"]:
            assert response["reward"] == response["reward_parts"]["right"] == (response["text"].strip() == right)
    metrics = json.loads((tmp_path / "work/brain/metrics.jsonl").read_text().splitlines()[0])
    rewards = [response["reward"] for rollout in rollouts for response in rollout["responses"]]
    assert abs(metrics["reward/right"] - sum(rewards) / len(rewards)) < 1e-9
