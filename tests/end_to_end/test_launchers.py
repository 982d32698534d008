"""Real launchers: mpirun, mpiexec and srun start one run, which has the losses of one process.

Each launcher is tested if it is installed (Debian: openmpi-bin, mpich; srun needs a running Slurm).
"""

import shutil
import subprocess
import sys

import pytest
from helpers.assets import write_assets
from helpers.jobs import sft_flags, trajectory

LAUNCHERS = {
    "mpirun.openmpi": ["--allow-run-as-root", "--oversubscribe", "-n", "2"],
    "mpirun.mpich": ["-n", "2"],
    "srun": ["-n", "2"],
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder)
    return folder


def train(assets, save, *flags, launcher=()):
    command = [*launcher, sys.executable, *sft_flags(assets, save, 2, *flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [loss for _, loss, *_ in trajectory(save)]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_a_launcher_starts_is_one_run_with_the_losses_of_one_process(name, assets, tmp_path):
    if shutil.which(name) is None or (name == "srun" and subprocess.run(["sinfo"], capture_output=True).returncode):
        pytest.skip(f"{name} is not installed, or no Slurm runs")
    alone = train(assets, tmp_path / "alone")
    flags = ("--tensor-model-parallel-size", "2")
    together = train(assets, tmp_path / "together", *flags, launcher=[name, *LAUNCHERS[name]])
    assert len(alone) == 2 and together == pytest.approx(alone, rel=1e-5)
