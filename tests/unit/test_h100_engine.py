"""examples/h100 with vLLM servers beside a trainer: both are started together, and end together."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.stand_in_vllm import is_alive, kill_servers, pids, two_free_ports, wait_until, write_stand_in

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "h100"

RUNS_UNTIL_TERM = 'trap "echo saved; exit 0" TERM; echo $$ > {ready}; for _ in {{1..600}}; do sleep 0.05; done'
"""A run that saves when it is asked to stop."""

SRUN = """echo "$*" >> {calls}
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
"""An srun that starts one task here, whatever it is told."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a script with stand-ins for programs, given as the texts of bash scripts, and for vLLM."""
    model, python = write_stand_in(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name in ("RANK", "WORLD_SIZE", "NNODES", "MASTER_ADDR", "DRY_RUN", "LAUNCHER", "RUNS", "ROLE", "RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    settings = {"VLLM_PYTHON": str(python), "ENGINE_MODEL": str(model), "ENGINE_DIR": str(tmp_path / "engine")}
    settings["ENGINE_PORT"] = str(two_free_ports())
    started = []

    def run(script, *args, stand_ins, **env):
        for name, text in stand_ins.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (programs / name).chmod(0o755)
        process = subprocess.Popen(
            ["bash", str(EXAMPLES / script), *args],
            env=os.environ | settings | env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
    kill_servers(tmp_path)


def two_servers(**more):
    return {"ENGINE_SERVERS": "2", "ENGINE_TENSOR_PARALLEL": "1", "GPUS_PER_NODE": "4"} | more


@pytest.mark.parametrize("status", [0, 7])
def test_servers_on_the_trainers_node_end_with_the_run(status, start, tmp_path):
    told = f'printf "%s\\n" "$@" > {tmp_path}/told; exit {status}'
    process = start("launch.sh", "1", "brain", "run.yaml", "--lr", "1", stand_ins={"torchrun": told}, **two_servers())
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == status, shown
    *_, lr, flag, urls = (tmp_path / "told").read_text().splitlines()
    assert (lr, flag) == ("1", "--engine-url")
    assert len(urls.split(",")) == 2 and all(url.startswith("http://127.0.0.1:") for url in urls.split(","))
    assert len(pids(tmp_path)) == 4 and not any(map(is_alive, pids(tmp_path)))


def test_a_run_is_stopped_and_fails_when_its_servers_end(start, tmp_path):
    run = RUNS_UNTIL_TERM.format(ready=tmp_path / "ready")
    process = start("launch.sh", "1", "brain", "run.yaml", stand_ins={"torchrun": run}, **two_servers())
    wait_until((tmp_path / "ready").exists)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "saved" in shown and "have ended; stopping the run" in shown
    assert not any(map(is_alive, pids(tmp_path)))


def test_a_signal_reaches_the_run_and_then_the_servers_end(start, tmp_path):
    run = RUNS_UNTIL_TERM.format(ready=tmp_path / "ready")
    process = start("launch.sh", "1", "brain", "run.yaml", stand_ins={"torchrun": run}, **two_servers())
    wait_until((tmp_path / "ready").exists)
    process.terminate()
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "saved" in shown and "stopping the run" not in shown
    assert not any(map(is_alive, pids(tmp_path)))


def test_a_run_whose_servers_cannot_start_fails_at_once(start, tmp_path):
    (tmp_path / "model" / "config.json").unlink()
    process = start("launch.sh", "1", "brain", "run.yaml", stand_ins={"torchrun": "exit 0"}, **two_servers())
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "has no config.json" in shown and "0 of 1 nodes with servers answer" in shown


def test_engine_nodes_start_servers_and_end_with_the_trainer_on_other_nodes(start, tmp_path):
    settings = two_servers(ENGINE_NODES="2", ENGINE_HOST="127.0.0.1", ENGINE_SERVERS="1", MASTER_ADDR="a", ROLE="")
    port = two_free_ports()
    engines = [
        start(
            *("launch.sh", "2", "brain", "run.yaml"),
            stand_ins={},
            **settings | {"ROLE": "engine", "SLURMD_NODENAME": f"n{i}", "ENGINE_PORT": str(port + i)},
        )
        for i in range(2)
    ]
    told = {"torchrun": f'printf "%s\\n" "$@" > {tmp_path}/told'}
    trainer = start("launch.sh", "2", "brain", "run.yaml", stand_ins=told, **settings)
    assert trainer.wait(timeout=30) == 0
    urls = (tmp_path / "told").read_text().splitlines()[-1]
    assert urls == f"http://127.0.0.1:{port},http://127.0.0.1:{port + 1}"
    assert [engine.wait(timeout=30) for engine in engines] == [0, 0]
    assert not any(map(is_alive, pids(tmp_path)))


@pytest.mark.parametrize(("engine_nodes", "trainer", "servers"), [(0, "n1", "n1"), (1, "n1,n2", "n3")])
def test_one_slurm_job_has_a_step_of_servers_and_a_step_of_ranks(engine_nodes, trainer, servers, start, tmp_path):
    calls, nodes = tmp_path / "calls", 2 * engine_nodes + 1
    names = "\\n".join(f"n{i + 1}" for i in range(nodes))
    stand_ins = {
        "srun": SRUN.format(calls=calls),
        "scontrol": f'[ "$1" = show ] && printf "{names}\\n" || echo "scontrol $*" >> {calls}',
        "python": f'printf "%s\\n" "$@" > {tmp_path}/told; kill -USR1 $PPID; sleep 0.3',
    }
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}
    slurm |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    settings = two_servers(ENGINE_NODES=str(engine_nodes), ENGINE_HOST="127.0.0.1") | slurm
    job = start("launch_slurm.sbatch", "brain", "run.yaml", "--lr", "1", stand_ins=stand_ins, **settings)
    shown, _ = job.communicate(timeout=40)
    assert job.returncode == 0, shown
    of_servers, of_ranks, requeued = sorted(calls.read_text().splitlines(), key=lambda call: "node.sh" not in call)
    assert f"--overlap --nodelist={servers} --nodes=1 --ntasks=1 " in of_servers
    ranks = f"--overlap --nodelist={trainer} --nodes={engine_nodes + 1} --ntasks={4 * (engine_nodes + 1)} "
    assert ranks in of_ranks and "--kill-on-bad-exit=0" in of_ranks
    assert requeued == "scontrol requeue 42"  # the rank was asked to stop, and saved
    assert "--engine-url" in (tmp_path / "told").read_text()
    assert len(pids(tmp_path)) == 4 and not any(map(is_alive, pids(tmp_path)))


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("llama3_8b_brain_vllm.sh", {"--nodes=1", "--ntasks-per-node=4", "--gpus-per-node=8"}),
        ("llama3_70b_brain_vllm.sh", {"--nodes=10", "--ntasks-per-node=8", "--gpus-per-node=8"}),
    ],
)
def test_a_job_asks_for_the_servers_nodes_and_gpus_too(script, flags, start):
    job = start(script, stand_ins={"sbatch": 'echo "$@ gpus:$ENGINE_GPUS"'}, LAUNCHER="slurm")
    told, _ = job.communicate(timeout=30)
    assert flags <= set(told.split()), told
    assert told.split()[-1] == ("gpus:4,5,6,7" if "8b" in script else "gpus:")
