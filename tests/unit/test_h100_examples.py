"""The scripts of examples/h100, each at its real world size: what they start, and that it fits an H100."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.reports import read_report

from megatron_brain.__main__ import main
from megatron_brain.config.loader import load_config
from megatron_brain.models.architecture import architecture, resolve
from megatron_brain.planning.presets import preset

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "h100"
MEMORY = "Memory per GPU, on the fullest (estimate)"
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496}  # of the model cards

# tensor, pipeline, data; samples of a step; tokens of the longest sample
RUNS = {  # one for each configuration
    "llama3_8b_sft": ((2, 1, 4), 64, 8192),
    "llama3_8b_reward": ((2, 1, 4), 128, 2048 + 2 * 1024),
    "llama3_8b_brain": ((2, 1, 4), 64, 1024 + 16 * 512),
    "llama3_70b_sft": ((4, 4, 4), 128, 4096),
    "llama3_70b_reward": ((4, 4, 4), 128, 2048 + 2 * 1024),
    "llama3_70b_brain": ((8, 2, 4), 64, 1024 + 16 * 512),
}
WITH_SERVERS = {  # of the same configurations
    "llama3_8b_brain_vllm": ((2, 1, 2), 64, 1024 + 16 * 512),
    "llama3_70b_brain_vllm": ((8, 2, 4), 64, 1024 + 16 * 512),
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a program first on PATH that does what the text of a bash script says."""

    def put(name, text):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "NNODES",
        "MASTER_ADDR",
        "DRY_RUN",
        "LAUNCHER",
        "RUNS",
        "DATA",
    ):
        monkeypatch.delenv(name, raising=False)
    return put


def bash(script, *args, **env):
    return subprocess.run(
        ["bash", EXAMPLES / script, *args],
        env=os.environ | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def said(result):
    """Lines of a stand-in that tells its arguments one by one."""
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_every_configuration_has_its_script_and_is_among_those_tested():
    names = set(RUNS)
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == names
    assert {path.stem for path in EXAMPLES.glob("llama3_*.sh")} == names | set(WITH_SERVERS)


@pytest.mark.parametrize("name", [*RUNS, *WITH_SERVERS])
def test_a_dry_run_of_the_script_fits_an_h100_at_its_real_world_size(name, stand_in, monkeypatch, capsys):
    stand_in("python", 'echo "$WORLD_SIZE $LOCAL_WORLD_SIZE"; printf "%s\\n" "$@"')
    sizes, module, package, *argv = said(bash(f"{name}.sh", DRY_RUN="1"))
    assert (module, package) == ("-m", "megatron_brain")
    world_size, per_node = sizes.split()
    (tensor, pipeline, data), samples, tokens = (RUNS | WITH_SERVERS)[name]
    assert int(world_size) == tensor * pipeline * data and per_node == str(min(8, int(world_size)))

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
    assert main(argv) == 0
    report = read_report(capsys.readouterr().out)

    assert report["Layout"]["world"] == f"{world_size} = tensor {tensor} x data {data} x pipeline {pipeline}"
    assert "warning" not in report["Layout"] and "warning" not in report[MEMORY]
    assert report["Batch"]["tokens of a step"].startswith(f"at most {samples * tokens:,}: {samples} ")
    assert report["Model"]["parameters"].startswith(f"{PARAMETERS[name.split('_')[1]]:,} ") or "reward" in name
    assert ("vLLM" in report.get("Engine", {}).get("engine", "")) == (name in WITH_SERVERS)
    assert report["FP8"]["format"] == ("none: no FP8" if "brain" in name else "hybrid")
    check_memory(report, data)


def check_memory(report, data):
    """Gradients and optimizer by hand; the total leaves a tenth of the device to CUDA, NCCL and fragmentation."""
    parameters = int(report["Model"]["parameters per GPU"].split()[0].replace(",", ""))
    memory = {part: float(text.split()[0]) for part, text in report[MEMORY].items() if "GiB" in text}
    assert memory["gradients"] == pytest.approx(parameters * 4 / 2**30, abs=0.06)
    assert memory["optimizer"] == pytest.approx(parameters * 12 / data / 2**30, abs=0.06)
    parts = sum(size for part, size in memory.items() if part != "total")
    assert memory["total"] == pytest.approx(parts, abs=0.3)
    assert memory["total"] < 0.9 * 79


@pytest.mark.parametrize(
    ("name", "batch", "bubble"),
    [
        ("llama3_8b_sft", "64 sequences = micro-batch 1 x data 4 x 16 micro-batches", "none"),
        # 3 slots of waiting; 32 micro-batches through 80 / 4 / 4 = 5 chunks
        ("llama3_70b_sft", "128 sequences = micro-batch 1 x data 4 x 32 micro-batches", f"{3 / 163:.1%} of a step"),
    ],
)
def test_the_batches_of_sft_are_those_reckoned_by_hand(name, batch, bubble, stand_in, monkeypatch, capsys):
    nodes = 8 if "70b" in name else 1
    monkeypatch.setenv("WORLD_SIZE", str(nodes * 8))
    argv = ["--config", f"{EXAMPLES}/{name}.yaml", "--train-data", "/no", "--valid-data", "/no", "--load", "/no"]
    assert main(["sft", *argv, "--finetune", "--save", "/no", "--dry-run"]) == 0
    shown = read_report(capsys.readouterr().out)["Batch"]
    assert shown["global batch"] == batch and shown["pipeline bubble"].startswith(bubble)


@pytest.mark.parametrize("name", RUNS)
def test_the_sizes_in_the_files_are_those_of_the_published_model(name):
    stage = name.split("_")[2]
    argv = ["--config", f"{EXAMPLES}/{name}.yaml", "--load", "x", "--finetune", "--save", "y"]
    argv += (
        ["--train-data", "t", "--valid-data", "v"] if stage != "brain" else ["--train-data", "t", "--reward-load", "r"]
    )
    model = load_config(stage, argv).model
    published = architecture(preset(f"llama3-{name.split('_')[1]}"))
    assert architecture(resolve(model, published, "the model")) == published
    assert architecture(resolve(model, None, "the file")) == published


def test_a_script_ends_as_the_dry_run_does(stand_in):
    stand_in("python", f'exec {sys.executable} "$@"')
    done = bash("llama3_8b_brain.sh", DRY_RUN="1")
    assert done.returncode == 0 and "brain on 8 processes" in done.stdout
    refused = bash("llama3_8b_brain.sh", "--global-batch-size", "63", DRY_RUN="1")
    assert refused.returncode == 2 and refused.stderr.startswith("error: prompts_per_round=256 is not a multiple")


def test_torchrun_is_standalone_on_one_node_and_meets_at_the_first_of_several(stand_in):
    stand_in("torchrun", 'echo "$CUDA_DEVICE_MAX_CONNECTIONS $PET_SHUTDOWN_TIMEOUT"; printf "%s\\n" "$@"')
    one = said(bash("llama3_8b_sft.sh", "--seed", "3"))
    assert one[0] == "1 280" and "--standalone" in one and "--rdzv-endpoint" not in one
    assert one[one.index("-m") : one.index("-m") + 5] == [
        *("-m", "megatron_brain", "sft", "--config", "examples/h100/llama3_8b_sft.yaml")
    ]
    assert one[-2:] == ["--seed", "3"]
    many = said(bash("llama3_70b_sft.sh", MASTER_ADDR="10.0.0.1"))
    for flag, value in (("--nnodes", "8"), ("--nproc-per-node", "8"), ("--rdzv-endpoint", "10.0.0.1:29400")):
        assert many[many.index(flag) + 1] == value
    # A round of brain takes longer. By variables: a torch that lacks the flags would refuse them.
    assert said(bash("llama3_8b_brain.sh"))[0] == "1 1180" and "--shutdown-timeout" not in one
    without = bash("llama3_70b_sft.sh")
    assert without.returncode != 0 and "MASTER_ADDR" in without.stderr


def test_slurm_gets_name_nodes_and_the_run(stand_in):
    stand_in("sbatch", 'printf "%s\\n" "$@"')
    told = said(bash("llama3_70b_brain.sh", LAUNCHER="slurm", SBATCH_ARGS="--partition=h100"))
    job = told.index("examples/h100/launch_slurm.sbatch")
    assert {"--job-name=llama3_70b_brain", "--nodes=8", "--partition=h100"} <= set(told[:job])
    assert told[job + 1 : job + 3] == ["brain", "examples/h100/llama3_70b_brain.yaml"]
    assert (ROOT / told[job]).is_file()


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False), (2, False), (137, False)])
def test_a_job_is_requeued_where_its_ranks_were_stopped_and_nowhere_else(status, requeued, stand_in, tmp_path):
    calls = tmp_path / "calls"
    stand_in("srun", f'echo "srun $MASTER_ADDR $*" >> {calls}; exit {status}')
    stand_in("scontrol", f'[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "scontrol $*" >> {calls}')
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"}
    done = bash("launch_slurm.sbatch", "sft", "run.yaml", "--lr", "1", **slurm)
    first, *others = calls.read_text().splitlines()
    assert first.startswith("srun node1 --cpu-bind=none ") and first.endswith("slurm_task.sh sft run.yaml --lr 1")
    assert others == (["scontrol requeue 42"] if requeued else [])
    assert done.returncode == (0 if requeued else status)


@pytest.mark.parametrize(
    ("sent", "ends_with", "status"),
    [(None, 0, 0), (None, 2, 2), ("USR1", 0, 75), ("TERM", 0, 75), ("USR1", 1, 1), ("USR1", None, 75)],
)
def test_a_rank_that_saved_because_it_was_asked_to_ends_with_75(sent, ends_with, status, stand_in, tmp_path):
    """The run is one that takes a while to save, and that Slurm's signal reaches through its shell alone.

    One that ends with None has not come so far that it would note the signal, which kills it.
    """
    ready = tmp_path / "ready"
    run = f"exit {ends_with}"
    if sent:  # it gives up some time after the signal should have come
        saves = f'trap "sleep 0.2; {run}" USR1 TERM; ' if ends_with is not None else ""
        run = f"{saves}touch {ready}; for _ in {{1..200}}; do sleep 0.02; done; exit 98"
    stand_in("python", f'[ "$RANK $LOCAL_RANK $WORLD_SIZE" = "9 1 16" ] || exit 99; {run}')
    slurm = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
    with subprocess.Popen(["bash", EXAMPLES / "slurm_task.sh", "sft", "run.yaml"], env=os.environ | slurm) as task:
        while sent and not ready.exists():
            time.sleep(0.02)
        for _ in range(2 if sent else 0):  # a second signal, while it saves, changes nothing
            task.send_signal(signal.Signals[f"SIG{sent}"])
            time.sleep(0.05)
        assert task.wait(timeout=20) == status


def test_the_job_may_be_requeued_and_its_ranks_are_told_before_the_time_is_up():
    directives = re.findall(r"^#SBATCH (\S+)$", (EXAMPLES / "launch_slurm.sbatch").read_text(), flags=re.MULTILINE)
    assert {"--requeue", "--signal=USR1@300", "--open-mode=append", "--dependency=singleton"} <= set(directives)


def test_shell_scripts_pass_shellcheck():
    scripts = [*ROOT.glob("*.sh"), ROOT / ".ci" / "run"]
    for folder in ("examples", "tests", "tools"):
        scripts += [path for ending in ("sh", "sbatch") for path in (ROOT / folder).rglob(f"*.{ending}")]
    program = Path(sys.executable).with_name("shellcheck")
    assert program.is_file(), "pip install -e .[test] brings shellcheck"
    checked = subprocess.run(
        [program, "--external-sources", *filter(Path.is_file, scripts)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
