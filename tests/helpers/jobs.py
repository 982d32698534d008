"""A training run in the background. Tests can watch it, signal its processes and read its files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from helpers.assets import size_flags

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
_PATIENCE_SECONDS = 120


def sft_flags(assets: Path, save: Path, train_iters: int, *flags: str) -> list[str]:
    """Flags of `-m megatron_brain sft` on the tiny assets. The run resumes from `save` where it holds a checkpoint."""
    return [
        *("-m", "megatron_brain", "sft", "--no-progress", *size_flags(num_layers=2), "--seq-length", "32"),
        *("--tokenizer-model", str(assets / "tokenizer"), "--train-data", str(assets / "sft.jsonl")),
        *("--save", str(save), "--auto-resume", "--train-iters", str(train_iters), "--lr", "3e-3", *flags),
    ]


def trajectory(save: Path) -> list[tuple[float, ...]]:
    """Iteration, loss, gradient norm and learning rate of every step that is logged in a run's folder."""
    names = ("iteration", "loss", "grad_norm", "lr")
    text = (save / "metrics.jsonl").read_text() if (save / "metrics.jsonl").exists() else ""
    # A line that is still being written has no line break yet.
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [tuple(line[name] for name in names) for line in lines if "loss" in line]


def last_iteration(save: Path) -> int:
    """The last step that is logged in a run's folder; 0 where there is none."""
    steps = trajectory(save)
    return int(steps[-1][0]) if steps else 0


def saved_iteration(save: Path) -> int:
    """The iteration a resumed run would start from."""
    return int((save / "latest_checkpointed_iteration.txt").read_text())


class Job:
    """A command with all the processes that it starts. The end of the context kills those that still run.

    Args:
        command: what to run, in the checkout.
        log: file that gets its output.
        env: environment variables to add.
    """

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_for_iteration(self, save: Path, iteration: int) -> None:
        """Wait until the run has logged that step."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while last_iteration(save) < iteration:
            assert self._process.poll() is None, f"ended before iteration {iteration}:\n{self.output[-5000:]}"
            assert time.monotonic() < deadline, f"iteration {iteration} was not reached:\n{self.output[-5000:]}"
            time.sleep(0.02)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Signal the process of a rank that torchrun started, or the command itself."""
        process = psutil.Process(self._process.pid)
        if rank is not None:
            (process,) = [child for child in process.children() if child.environ().get("RANK") == str(rank)]
        process.send_signal(number)

    def finish(self) -> int:
        """Wait for the command to end; returns its exit status."""
        try:
            return self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {_PATIENCE_SECONDS} s:\n{self.output[-5000:]}") from None

    def kill(self) -> None:
        """SIGKILL the command and everything it started."""
        if self._process.poll() is None:
            processes = psutil.Process(self._process.pid).children(recursive=True)
            for process in [*processes, self._process]:
                # A listed process may have ended by itself before this line.
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
