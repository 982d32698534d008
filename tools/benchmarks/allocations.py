"""Bytes of tensors that exist, over time, as PyTorch's profiler sees the CPU allocator.

Resident memory would not do: it includes the interpreter, libraries, and freed memory that the C library keeps, and
excludes memory that was never written to. On a GPU the caching allocator counts the same bytes.
"""

import functools
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "phase: "
_SETTLE_SECONDS = 5.0


@dataclass
class Allocations:
    """Figures in bytes; they are filled in when `recorded` ends."""

    peak: int = 0
    """The most bytes that existed at one time."""
    phase_peaks: dict[str, int] = field(default_factory=dict)
    """The most bytes during a phase, over all its runs, by its name."""
    phase_ends: dict[str, int] = field(default_factory=dict)
    """The bytes that existed at the last end of a phase, by its name."""


@contextmanager
def recorded() -> Iterator[Allocations]:
    """Record all tensors that this thread, and the backward passes that it starts, allocate in the context."""
    found = Allocations()
    gc.collect()  # Otherwise the context could free tensors that it did not allocate.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    _read(events, found)


def _read(events: list[dict], found: Allocations) -> None:
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    changes.sort(key=lambda change: change[0])
    # The profiler's own total does not serve: it begins where an earlier recording ended.
    totals = list(
        zip((moment for moment, _ in changes), itertools.accumulate(size for _, size in changes), strict=True)
    )
    found.peak = max((total for _, total in totals), default=0)
    for event in sorted((e for e in events if str(e.get("name")).startswith(_MARK)), key=lambda e: e["ts"]):
        name, start, end = event["name"].removeprefix(_MARK), event["ts"], event["ts"] + event["dur"]
        inside = [total for moment, total in totals if start <= moment <= end]
        found.phase_peaks[name] = max(found.phase_peaks.get(name, 0), *inside, 0)
        found.phase_ends[name] = next((total for moment, total in reversed(totals) if moment <= end), 0)


def mark(name: str, function: Callable) -> Callable:
    """The function with its calls marked as a phase of the recording."""

    @functools.wraps(function)
    def marked(*args, **kwargs):
        with record_function(_MARK + name):
            return function(*args, **kwargs)

    return marked


def settle_collectives() -> None:
    """Make collectives free their tensors in the thread that calls them: the profiler does not see what gloo's threads
    free. Call this before megatron-core is imported, because it keeps references to these functions.

    The two of sequence parallelism are built from others that work in place, as NCCL's do; gloo's make copies.
    """
    from_group = dist.get_global_rank
    all_reduce, broadcast = _settled(dist.all_reduce), _settled(dist.broadcast)
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def all_gather_into_tensor(output, input_, group=None, async_op=False):
        if _is_coalesced(group):
            return gather(output, input_, group=group, async_op=async_op)
        parts = output.chunk(group.size())
        parts[group.rank()].copy_(input_)
        for rank, part in enumerate(parts):
            broadcast(part, src=from_group(group, rank), group=group)
        return _Done() if async_op else None

    def reduce_scatter_tensor(output, input_, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if _is_coalesced(group):
            return scatter(output, input_, op=op, group=group, async_op=async_op)
        all_reduce(input_, op=op, group=group)
        output.copy_(input_.chunk(group.size())[group.rank()])
        return _Done() if async_op else None

    dist.all_reduce, dist.broadcast = all_reduce, broadcast
    dist.all_gather_into_tensor, dist.reduce_scatter_tensor = all_gather_into_tensor, reduce_scatter_tensor


def _is_coalesced(group: dist.ProcessGroup) -> bool:
    """Whether calls are collected to be made together later, as for gradient and parameter buffers."""
    return group in dist.distributed_c10d._world.pg_coalesce_state


class _Done:
    """The handle of a collective that is already complete."""

    def wait(self, *args) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _settled(collective: Callable) -> Callable:
    """The collective, which returns only after the thread that ran it has released its tensor."""

    @functools.wraps(collective)
    def settled(tensor, *args, group=None, async_op=False, **kwargs):
        if _is_coalesced(group):
            return collective(tensor, *args, group=group, async_op=async_op, **kwargs)
        before = tensor._use_count()
        collective(tensor, *args, group=group, **kwargs)
        end = time.monotonic() + _SETTLE_SECONDS
        while tensor._use_count() > before:
            if time.monotonic() > end:
                raise RuntimeError("a collective is over and its tensor is still held: peaks cannot be measured")
            time.sleep(1e-4)
        return _Done() if async_op else None

    return settled
