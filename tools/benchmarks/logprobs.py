"""Time and peak memory of log-probabilities without whole logits, relative to the usual way with whole logits.

    python tools/benchmark.py logprobs --positions 4096 --vocab-size 131072 --hidden-size 512

It runs forward and backward pass on the CPU in three ways: whole logits (float32 log_softmax, gather, autograd),
recomputed, and known gradient. Time: the ways run in turn, in both orders. A ratio is the median over repeats of the
ratio to whole logits in the same repeat, in wall time and in CPU time of the process, which other work on the machine
disturbs less. Memory: each way runs in a fresh process; its figure is the process's peak minus the peak of a process
that only holds inputs, parameters and gradients.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.timing import in_turns
from megatron_brain.models.logprobs import DEFAULT_CHUNK_SIZE, vocab_parallel_logprobs

WHOLE = "full_logits"
OURS = ["recompute", "known_gradient"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--chunk-size", type=int, default=DEFAULT_CHUNK_SIZE, help="logits that exist at one time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)


def run(args: argparse.Namespace) -> dict:
    """Measure everything; ratios are to whole logits.

    Returns:
        time_ratio, cpu_time_ratio, memory_ratio: by way.
        seconds, cpu_seconds: medians by way. memory_mib: by way, without inputs, parameters and gradients.
        differences: by way, the largest difference of a log-probability or gradient, relative to the largest value.
        failures: ways whose differences are beyond rounding.
    """
    memory = _memory_mib(args)
    problem = Problem(args)
    differences = problem.differences()
    samples = in_turns({way: getattr(problem, way) for way in [WHOLE, *OURS]}, rounds=args.repeats, label="logprobs")
    wall = {way: [times.wall for times in taken] for way, taken in samples.items()}
    cpu = {way: [times.cpu for times in taken] for way, taken in samples.items()}
    return {
        "time_ratio": {way: _median_ratio(wall[way], wall[WHOLE]) for way in OURS},
        "cpu_time_ratio": {way: _median_ratio(cpu[way], cpu[WHOLE]) for way in OURS},
        "memory_ratio": {way: memory[way] / memory[WHOLE] for way in OURS},
        "seconds": {way: statistics.median(times) for way, times in wall.items()},
        "cpu_seconds": {way: statistics.median(times) for way, times in cpu.items()},
        "memory_mib": memory,
        "differences": differences,
        "failures": [
            f"{way} differs from whole logits by {difference:.2g}"
            for way, difference in differences.items()
            if not difference <= TOLERANCE[args.dtype]
        ],
    }


class Problem:
    """Random inputs, and forward and backward pass in each way. Gradients start as None, as after zero_grad."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, args.dtype)
        # It is filled in place: a temporary would raise the peak of the process that only holds inputs.
        self.hidden = torch.empty(args.positions, args.hidden_size, dtype=dtype).normal_(generator=generator)
        self.weight = torch.empty(args.vocab_size, args.hidden_size, dtype=dtype)
        self.weight.normal_(std=args.hidden_size**-0.5, generator=generator)
        self.targets = torch.randint(args.vocab_size, (args.positions,), generator=generator)
        self.slopes = torch.randn(args.positions, generator=generator)
        self.options = {"group": dist.group.WORLD, "vocab_size": args.vocab_size, "chunk_size": args.chunk_size}
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def full_logits(self) -> Tensor:
        logits = (self.hidden @ self.weight.t()).float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, self.targets[:, None]).squeeze(1)
        del logits  # autograd needs only the result of log_softmax
        return self._backward(logprobs)

    def recompute(self) -> Tensor:
        return self._backward(vocab_parallel_logprobs(self.hidden, self.weight, self.targets, **self.options))

    def known_gradient(self) -> Tensor:
        options = {**self.options, "known_gradient": self.slopes}
        return self._backward(vocab_parallel_logprobs(self.hidden, self.weight, self.targets, **options))

    def inputs_and_gradients(self) -> None:
        """Hold what every way needs: this is the floor of the memory measurement."""
        self.hidden.grad = torch.full_like(self.hidden, 1.0)
        self.weight.grad = torch.full_like(self.weight, 1.0)

    def _backward(self, logprobs: Tensor) -> Tensor:
        self.hidden.grad = self.weight.grad = None
        logprobs.backward(self.slopes)
        return logprobs.detach()

    def differences(self) -> dict[str, float]:
        """By way, the largest difference of a log-probability or gradient, relative to the largest of its kind."""
        expected = self.full_logits(), self.hidden.grad, self.weight.grad
        found = {}
        for way in OURS:
            actual = getattr(self, way)(), self.hidden.grad, self.weight.grad
            pairs = zip(actual, expected, strict=True)
            found[way] = max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)
        return found


def _median_ratio(times: list[float], standard: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, standard, strict=True))


def _memory_mib(args: argparse.Namespace) -> dict[str, float]:
    floor, *peaks = (_peak_in_fresh_process(way, args) for way in ["inputs_and_gradients", WHOLE, *OURS])
    return {way: peak - floor for way, peak in zip([WHOLE, *OURS], peaks, strict=True)}


def _peak_in_fresh_process(way: str, args: argparse.Namespace) -> float:
    """Peak resident memory in MiB of a process that runs one way once."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in vars(parser.parse_args([]))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "benchmarks.logprobs", f"--way={way}", *flags]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _peak_mib() -> float:
    # VmHWM starts anew with a process; ru_maxrss does not: through exec a process inherits the peak of its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _report_peak() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--way", required=True)
    args = parser.parse_args()
    getattr(Problem(args), args.way)()
    print(json.dumps(_peak_mib()))


if __name__ == "__main__":
    _report_peak()
