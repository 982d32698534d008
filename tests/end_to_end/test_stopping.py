"""A run of two processes is stopped, killed and restarted in every way. Its trajectory equals an uninterrupted one."""

import re
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.assets import write_assets
from helpers.jobs import TORCHRUN, Job, last_iteration, saved_iteration, sft_flags, trajectory

ITERATIONS = 60
TWO_PROCESSES = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
USR1_TOO = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "100")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with assets. The tests below continue the run in `stopped` one after another."""
    directory = tmp_path_factory.mktemp("stopping")
    write_assets(directory)
    return directory


def flags(work: Path, *more: str, save: str = "stopped") -> list[str]:
    return sft_flags(
        work, work / save, ITERATIONS, "--pipeline-model-parallel-size", "2", "--global-batch-size", "4", *more
    )


def check_saved_where_it_stopped(save: Path, began: int) -> None:
    """Check that the checkpoint is that of the last step, in the middle of the run."""
    assert began + 3 <= last_iteration(save) < ITERATIONS
    assert saved_iteration(save) == last_iteration(save)


def test_sigterm_of_one_rank_stops_all_with_status_0_however_often_it_comes(work):
    with Job([*TWO_PROCESSES, *flags(work)], work / "log") as job:
        job.wait_for_iteration(work / "stopped", 3)
        for _ in range(3):
            job.send(signal.SIGTERM, rank=1)
            time.sleep(0.01)
        assert job.finish() == 0, job.output[-5000:]
    assert "SIGTERM (rank 1)" in job.output
    check_saved_where_it_stopped(work / "stopped", began=0)


def test_sigusr1_of_one_rank_stops_all_with_status_0_without_torchrun(work):
    """This is as under `srun`, which starts and signals the ranks itself."""
    began = saved_iteration(work / "stopped")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(Job([sys.executable, *flags(work)], work / f"log{rank}", {**world, "RANK": str(rank)}))
            for rank in range(2)
        ]
        jobs[0].wait_for_iteration(work / "stopped", began + 3)
        jobs[1].send(signal.SIGUSR1)
        assert [job.finish() for job in jobs] == [0, 0], jobs[0].output[-3000:] + jobs[1].output[-3000:]
    assert "SIGUSR1 (rank 1)" in jobs[0].output
    check_saved_where_it_stopped(work / "stopped", began)


def test_torchrun_passes_a_signal_it_handles_on_and_waits_for_the_save(work):
    began = saved_iteration(work / "stopped")
    with Job([*TWO_PROCESSES, *USR1_TOO, *flags(work)], work / "log") as job:
        job.wait_for_iteration(work / "stopped", began + 3)
        job.send(signal.SIGUSR1)
        assert job.finish() == 1, "torchrun that got a signal ends with 1, whatever its workers say"
    # The ranks may agree to stop before torchrun has told the second one.
    assert re.search(r"SIGUSR1 \(rank [01]\)", job.output), job.output[-5000:]
    check_saved_where_it_stopped(work / "stopped", began)


def test_a_killed_rank_is_restarted_from_the_last_checkpoint_and_the_trajectory_is_the_uninterrupted_one(work):
    with Job([*TWO_PROCESSES, *flags(work, save="uninterrupted")], work / "log") as job:
        assert job.finish() == 0, job.output[-5000:]
    began = saved_iteration(work / "stopped")
    restarting = [*TWO_PROCESSES, "--max-restarts", "1", *flags(work, "--save-interval", "5")]
    with Job(restarting, work / "log") as job:
        job.wait_for_iteration(work / "stopped", began + 7)
        job.send(signal.SIGKILL, rank=1)
        assert job.finish() == 0, job.output[-5000:]
    assert job.output.count("sft with megatron_brain") == 2, "no restart"
    assert trajectory(work / "stopped") == trajectory(work / "uninterrupted")
    assert last_iteration(work / "stopped") == ITERATIONS
