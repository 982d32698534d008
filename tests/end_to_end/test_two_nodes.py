"""Two nodes (network namespaces joined by a virtual cable) train as one node does, and survive the loss of a node.

Needs root and `ip netns`. RUN_SLOW_TESTS=1 adds the cut cable, where only a timeout tells that a node is gone.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.assets import write_assets
from helpers.jobs import TORCHRUN, Job, last_iteration, saved_iteration, sft_flags, trajectory

ITERATIONS = 40
TIMEOUT_SECONDS = 60
ADDRESSES = ("10.99.0.1", "10.99.0.2")
slow = pytest.mark.skipif("RUN_SLOW_TESTS" not in os.environ, reason="waits for a timeout: set RUN_SLOW_TESTS=1")


@dataclass(frozen=True)
class Node:
    """A network namespace with one network interface besides its loopback."""

    rank: int
    name: str
    interface: str

    def set_cable(self, state: str) -> None:
        ip("-n", self.name, "link", "set", self.interface, state)

    def train(self, work: Path, save: Path, log: str) -> Job:
        """Start this node's part of the run."""
        command = [
            *("ip", "netns", "exec", self.name, *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", log),
            *("--rdzv-conf", f"is_host={int(self.rank == 0)}", "--local-addr", ADDRESSES[self.rank]),
        ]
        return Job(
            [*command, *flags(work, save)], work / f"{log}_{self.rank}", env={"GLOO_SOCKET_IFNAME": self.interface}
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def flags(work: Path, save: Path) -> list[str]:
    return sft_flags(
        *(work, save, ITERATIONS, "--save-interval", "5", "--global-batch-size", "4"),
        *("--distributed-timeout-minutes", str(TIMEOUT_SECONDS // 60)),
    )


@pytest.fixture(scope="module")
def nodes() -> Iterator[Sequence[Node]]:
    """Two nodes that reach each other only through the cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    tag = f"mb{os.getpid()}"
    made = [Node(rank, f"{tag}n{rank}", f"{tag}v{rank}") for rank in range(2)]
    try:
        try:
            for node in made:
                ip("netns", "add", node.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        first, second = made
        peer = ("type", "veth", "peer", "name", second.interface, "netns", second.name)
        ip("link", "add", first.interface, "netns", first.name, *peer)
        for node, address in zip(made, ADDRESSES, strict=True):
            ip("-n", node.name, "addr", "add", f"{address}/24", "dev", node.interface)
            ip("-n", node.name, "link", "set", "lo", "up")
            node.set_cable("up")
        yield made
    finally:
        for node in made:
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def work(nodes, tmp_path_factory) -> Path:
    """A folder with assets and `one_node`, the run that the runs of two nodes must equal."""
    directory = tmp_path_factory.mktemp("two_nodes")
    write_assets(directory)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *flags(directory, directory / "one_node")]
    with Job(command, directory / "log") as job:
        assert job.finish() == 0, job.output[-5000:]
    return directory


@pytest.mark.parametrize("fault", ["killed", pytest.param("cut_off", marks=slow)])
def test_a_node_lost_is_a_clear_error_on_the_other_and_both_resume_to_the_one_node_trajectory(nodes, work, fault):
    save = work / fault
    with ExitStack() as stack:
        first, second = (stack.enter_context(node.train(work, save, fault)) for node in nodes)
        first.wait_for_iteration(save, 8)
        lost = time.monotonic()
        if fault == "killed":
            second.kill()
        else:
            nodes[1].set_cable("down")
        assert first.finish() == 1
        seconds = time.monotonic() - lost
    check_error(first.output)
    # The end of a process is noticed at once; a cut cable only by the timeout.
    if fault == "killed":
        assert seconds < TIMEOUT_SECONDS
    else:
        assert TIMEOUT_SECONDS - 5 < seconds < TIMEOUT_SECONDS + 30
        check_error(second.output)
    nodes[1].set_cable("up")
    assert 5 <= saved_iteration(save) <= last_iteration(save) < ITERATIONS
    with ExitStack() as stack:
        jobs = [stack.enter_context(node.train(work, save, f"{fault}_resumed")) for node in nodes]
        assert [job.finish() for job in jobs] == [0, 0], jobs[0].output[-3000:] + jobs[1].output[-3000:]
    assert trajectory(save) == trajectory(work / "one_node")


def check_error(output: str) -> None:
    """Check that the traceback comes first, then what failed, where, and what to do."""
    assert "RuntimeError: " in output and "/gloo/" in output, output[-5000:]
    _, _, message = output.partition("LostPeerError: ")
    message = message.partition("\n")[0]
    assert message.startswith("lost contact with another rank in "), output[-5000:]
    assert ", called in " in message and "(megatron_brain/" in message
    assert "--distributed-timeout-minutes 1" in message and "--auto-resume" in message
