"""Kills a run again and again, resumes it each time, and compares it with a run that is never killed.

    PYTHONPATH=. python tests/end_to_end/faults.py --folder DIR [--kills 25] [--stage sft] [--ranks 2] [--seed 0]

It prints a JSON report, and exits with 1 if a checkpoint could not be read or the two runs differ in any bit. Ranks are
forks of this process, which has imported everything and started no thread. So a resume takes one second, not ten. A
kill is a SIGKILL at a random moment, to one rank, whose death the others then notice, or to all ranks. Every second
kill waits until a save begins.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.assets import size_flags, write_assets
from helpers.jobs import last_iteration, saved_iteration, trajectory

_PATIENCE_SECONDS = 120
_ITERATIONS_A_KILL = 6
_LEFTOVERS = ("iter_*.partial", "iter_*.replaced", "iter_*.removed")


@dataclass
class Report:
    """What happened to the run, and how it compares."""

    kills: int = 0
    kills_inside_a_save: int = 0
    resumes_that_moved: int = 0
    checkpoints_read: int = 0
    corrupt: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Ranks:
    """The processes of a run."""

    def __init__(self, argv: list[str], count: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = log
        self._pids = [_fork(argv, rank, count, port, log) for rank in range(count)]
        self._statuses: dict[int, int] = {}

    def kill(self, rank: int | None) -> None:
        """SIGKILL one rank, and stop the others as a launcher does a moment later; None: SIGKILL all at once."""
        if rank is not None:
            os.kill(self._pids[rank], signal.SIGKILL)
            time.sleep(0.2)
        for pid in self._pids:
            if pid not in self._statuses:
                os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            self._reap(pid, 0)

    def ended(self) -> bool:
        """Whether all ranks have ended by themselves.

        Raises:
            RuntimeError: a rank failed.
        """
        for pid in self._pids:
            self._reap(pid, os.WNOHANG)
        if any(self._statuses.values()):
            raise RuntimeError(f"a rank failed: {self.log.read_text()[-4000:]}")
        return len(self._statuses) == len(self._pids)

    def _reap(self, pid: int, how: int) -> None:
        if pid not in self._statuses:
            done, status = os.waitpid(pid, how)
            if done:
                self._statuses[pid] = status


def _fork(argv: list[str], rank: int, count: int, port: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        from megatron_brain.__main__ import main as run_stage

        status = run_stage(argv)
    finally:
        os._exit(status)


def stage_argv(stage: str, assets: Path, save: Path, iterations: int) -> list[str]:
    """Arguments of a run that saves in the background after every second step."""
    common = [
        *("--no-progress", "--seq-length", "64", "--train-iters", str(iterations), "--global-batch-size", "4"),
        *("--save", str(save), "--auto-resume", "--async-save", "--save-interval", "2", "--keep-latest", "2"),
        *("--use-distributed-optimizer", "--lr", "1e-3"),
    ]
    if stage == "brain":
        return [
            *("brain", *common, "--train-data", str(assets / "prompts.jsonl"), "--prompts-per-round", "16"),
            *("--load", str(assets / "prior"), "--finetune", "--reward-load", str(assets / "reward")),
            *("--samples-per-prompt", "4", "--max-new-tokens", "8", "--reward-temperature", "0.1"),
        ]
    sizes = [*size_flags(num_layers=2), "--tokenizer-model", str(assets / "tokenizer")]
    dropout = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    return ["sft", *common, *sizes, *dropout, "--train-data", str(assets / "sft.jsonl")]


def run_alone(argv: list[str], count: int, log: Path) -> None:
    """Run the ranks to the end."""
    ranks = Ranks(argv, count, log)
    deadline = time.monotonic() + 10 * _PATIENCE_SECONDS
    while not ranks.ended():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.02)


def kill_once(ranks: Ranks, save: Path, count: int, *, in_save: bool, rng: random.Random) -> None:
    """Wait until a random moment, then kill."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    target = last_iteration(save) + rng.randint(1, _ITERATIONS_A_KILL)
    while last_iteration(save) < target:
        assert not ranks.ended(), "the run ended before it was killed: it needs more iterations"
        assert time.monotonic() < deadline, ranks.log.read_text()[-4000:]
        time.sleep(0.002)
    old = leftovers(save)
    while in_save and not leftovers(save) - old:
        assert not ranks.ended() and time.monotonic() < deadline, "no save began"
    time.sleep(rng.uniform(0.0, 0.03))
    ranks.kill(rng.choice([None, *range(count)]))


def latest(save: Path) -> int:
    """The iteration that a resume would start from; 0 if there is no checkpoint."""
    return saved_iteration(save) if (save / "latest_checkpointed_iteration.txt").exists() else 0


def leftovers(save: Path) -> set[tuple[str, int]]:
    """Folders of saves that are going on or were cut off. Each save has another folder."""
    found = set()
    for path in (path for pattern in _LEFTOVERS for path in save.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def read_all(save: Path, report: Report) -> None:
    """Read every byte of the checkpoint that a resume would start from."""
    from megatron_brain.checkpointing import has_checkpoint, read_info, read_records
    from megatron_brain.checkpointing.storage import read_tensors

    if not has_checkpoint(save):
        return
    try:
        info = read_info(save)
        read_tensors(info.path)
        read_records(info)
        report.checkpoints_read += 1
    except Exception as error:
        report.corrupt.append(f"{save}: {error}")


def in_child(action, *args) -> object:
    """Call `action` in a fork, so that this process starts no threads. Returns its result."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with os.fdopen(write, "w") as file:
                json.dump(action(*args), file)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def check_latest(save: Path) -> dict:
    report = Report()
    read_all(save, report)
    return {"corrupt": report.corrupt, "checkpoints_read": report.checkpoints_read}


def differences(actual: Path, expected: Path, iterations: int) -> list[str]:
    """The differences of two finished runs: logged steps, and tensors of the last checkpoints."""
    import torch

    from megatron_brain.checkpointing import read_info
    from megatron_brain.checkpointing.storage import read_tensors

    found = []
    steps = trajectory(actual), trajectory(expected)
    if steps[0] != steps[1]:
        first = next((a for a, b in zip(*steps, strict=False) if a != b), f"{len(steps[0])} and {len(steps[1])} steps")
        found.append(f"trajectories differ: {first}")
    infos = [read_info(path) for path in (actual, expected)]
    if [info.iteration for info in infos] != [iterations, iterations]:
        found.append(f"saved last: iterations {infos[0].iteration} and {infos[1].iteration}, not {iterations}")
    mine, theirs = (read_tensors(info.path) for info in infos)
    if mine.keys() != theirs.keys():
        found.append("other tensors are stored")
    found += [f"{key} differs" for key, value in mine.items() if key in theirs and not torch.equal(value, theirs[key])]
    return found


def run_faults(folder: Path, *, stage: str, kills: int, count: int, seed: int) -> Report:
    """Kill and resume a run `kills` times, then let it end, and compare it with a run that is never killed."""
    rng, report, started = random.Random(seed), Report(), time.monotonic()
    assets, whole, faulted, log = folder / "assets", folder / "whole", folder / "faulted", folder / "log"
    assets.mkdir(parents=True)
    in_child(write_assets, assets)
    if stage == "brain":
        _train_scorers(assets, log)
    iterations = kills * _ITERATIONS_A_KILL + 2 * _ITERATIONS_A_KILL
    run_alone(stage_argv(stage, assets, whole, iterations), count, log)
    for number in range(kills):
        before, old = latest(faulted), leftovers(faulted)
        ranks = Ranks(stage_argv(stage, assets, faulted, iterations), count, log)
        kill_once(ranks, faulted, count, in_save=number % 2 == 1, rng=rng)
        report.kills += 1
        report.kills_inside_a_save += bool(leftovers(faulted) - old)
        seen = in_child(check_latest, faulted)
        report.corrupt += seen["corrupt"]
        report.checkpoints_read += seen["checkpoints_read"]
        report.resumes_that_moved += latest(faulted) > before
        if latest(faulted) < before:
            report.corrupt.append(f"kill {number + 1}: the latest checkpoint was {before}, is {latest(faulted)}")
        print(f"kill {number + 1}/{kills}", file=sys.stderr, flush=True)
    run_alone(stage_argv(stage, assets, faulted, iterations), count, log)
    report.differences = in_child(differences, faulted, whole, iterations)
    report.seconds = round(time.monotonic() - started, 1)
    return report


def _train_scorers(assets: Path, log: Path) -> None:
    """Train a prior and a reward model for one step each."""
    for stage, data, name in (("sft", "sft.jsonl", "prior"), ("reward", "pairs.jsonl", "reward")):
        run_alone(
            [
                *(stage, "--no-progress", *size_flags(num_layers=2), "--tokenizer-model", str(assets / "tokenizer")),
                *("--seq-length", "64", "--train-data", str(assets / data), "--train-iters", "1"),
                *("--save", str(assets / name)),
            ],
            1,
            log,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="new folder to work in")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--stage", choices=("sft", "brain"), default="sft")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    # Imported once, here, for all later ranks.
    from megatron_brain.config.stage_spec import stage_spec

    for stage in ("sft", "reward", "brain"):
        stage_spec(stage).load()
    report = run_faults(args.folder, stage=args.stage, kills=args.kills, count=args.ranks, seed=args.seed)
    print(json.dumps(vars(report), indent=2))
    return 1 if report.corrupt or report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
