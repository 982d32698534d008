"""Times of two ways to do the same. They are timed in turns, so that a busy machine disturbs both alike."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of one call: by the clock, and processor time of all threads of this process."""

    wall: float
    cpu: float


def measure(function: Callable[[], object]) -> Times:
    """Time one call, after collecting the garbage of earlier ones and finishing work on an accelerator."""
    gc.collect()
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    _synchronize()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def compare(
    ours: Callable[[], object], baseline: Callable[[], object], *, pairs: int, warm_up: int = 1, label: str = ""
) -> dict:
    """Time two functions in pairs of alternating order: A B, B A, A B, ...

    Returns:
        Medians of both, and of the pairs' ratios baseline / ours (above 1: ours is faster) with their extremes, by the
        clock and by processor time.
    """
    samples = in_turns({"ours": ours, "baseline": baseline}, rounds=pairs, warm_up=warm_up, label=label)
    report: dict = {"pairs": pairs}
    for kind in ("wall", "cpu"):
        seconds = {name: [getattr(times, kind) for times in taken] for name, taken in samples.items()}
        ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["baseline"], strict=True)]
        report[kind] = {
            "ours_seconds": statistics.median(seconds["ours"]),
            "baseline_seconds": statistics.median(seconds["baseline"]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return report


def in_turns(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1, label: str = ""
) -> dict[str, list[Times]]:
    """Time every function once a round, each round in the opposite order of the one before.

    Args:
        functions: what to time, by name.
        rounds: number of timed calls of each.
        warm_up: number of untimed rounds before them.
        label: start of the progress lines.
    """
    for _ in range(warm_up):
        for function in functions.values():
            function()
    samples: dict[str, list[Times]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(measure(functions[name]))
        shown = ", ".join(f"{name} {samples[name][-1].wall:.3f} s" for name in names)
        print(f"{label} {number + 1}/{rounds}: {shown}", file=sys.stderr, flush=True)
    return samples


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
