"""Runs the distributed cases of one world size under one torchrun, and writes a result for each case.

    python tests/distributed/world.py --assets DIR --results DIR/results_1.json --only 'matrix.reward$'
    torchrun --nproc-per-node 4 tests/distributed/world.py --assets DIR --results DIR/results_4.json \\
        --only '^4-tp2_dp2-matrix.reward$'

A case is a function `case_*(layout, context)` of a module cases_*.py, or an entry of the module's `CASES`. It runs once
for every layout of the world's size, or for those that `at` selects, on all ranks. It fails if any rank raises. One
process (size 1) runs first and writes what `context.reference` returns to the others. pytest does both for all cases
whose names contain a text: `pytest tests/distributed -k 4-tp2_dp2-matrix.reward`.
"""

import argparse
import gc
import importlib
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout at which a case runs."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    layers_per_virtual_stage: int | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def flags(self) -> list[str]:
        """The layout as command-line flags."""
        flags = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        if self.sp:
            flags.append("--sequence-parallel")
        if self.layers_per_virtual_stage:
            flags += ["--num-layers-per-virtual-pipeline-stage", str(self.layers_per_virtual_stage)]
        return flags


_LAYOUTS = [
    Layout(name="single"),
    Layout(name="tp2", tp=2),
    Layout(name="tp2_sp", tp=2, sp=True),
    Layout(name="pp2", pp=2),
    Layout(name="pp2_interleaved", pp=2, layers_per_virtual_stage=1),
    Layout(name="dp2", dp=2),
    Layout(name="tp4", tp=4),
    Layout(name="pp4", pp=4),
    Layout(name="dp4", dp=4),
    Layout(name="tp2_pp2", tp=2, pp=2),
    Layout(name="tp2_sp_pp2", tp=2, pp=2, sp=True),
    Layout(name="tp2_dp2", tp=2, dp=2),
    Layout(name="pp2_dp2", pp=2, dp=2),
    Layout(name="pp2_interleaved_dp2", pp=2, dp=2, layers_per_virtual_stage=1),
    Layout(name="tp2_pp2_dp2", tp=2, pp=2, dp=2),
]
LAYOUTS: dict[int, list[Layout]] = {
    size: [layout for layout in _LAYOUTS if layout.size == size] for size in sorted({x.size for x in _LAYOUTS})
}


@dataclass
class Context:
    """What a case may use: the assets, a folder that all ranks share, and results of one process."""

    assets: Path
    shared: Path
    world_size: int
    recorded: dict[str, object] = field(default_factory=dict)

    def reference(self, name: str, value: object) -> object:
        """The first value that one process gave for a name. Every later call returns it, in every world."""
        if self.world_size == 1:
            return self.recorded.setdefault(name, value)
        return self.expected(name)

    def expected(self, name: str) -> object:
        """The value that one process recorded under a name. The world of one may ask for it too."""
        if self.world_size == 1:
            return self.recorded[name]
        return json.loads((self.shared / "reference.json").read_text())[name]


Case = Callable[[Layout, Context], None]


def at(condition: Callable[[Layout], bool]) -> Callable[[Case], Case]:
    """Run a case only at layouts that meet a condition. At the layout of one process every case runs."""

    def mark(case: Case) -> Case:
        case.condition = condition
        return case

    return mark


def cases(layout: Layout) -> dict[str, Case]:
    """All cases that run at a layout, by name."""
    found: dict[str, Case] = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        module = importlib.import_module(f"distributed.{path.stem}")
        functions = {name[5:]: value for name, value in vars(module).items() if name.startswith("case_")}
        for name, case in {**functions, **getattr(module, "CASES", {})}.items():
            if layout.size == 1 or getattr(case, "condition", lambda _: True)(layout):
                found[f"{path.stem[6:]}.{name}"] = case
    return found


def case_names(size: int) -> list[str]:
    """Names `size-layout-module.case` of all cases that a world runs."""
    return [f"{size}-{layout.name}-{name}" for layout in LAYOUTS[size] for name in cases(layout)]


def run_all(context: Context, only: str = "") -> Iterator[tuple[str, str | None]]:
    """Run all cases of this world's size. Yields the name of each case and its error on any rank, or None."""
    import torch.distributed as dist

    chosen = [(layout, name, case) for layout in LAYOUTS[context.world_size] for name, case in cases(layout).items()]
    gc.freeze()  # Imported objects stay: collecting through them again and again takes longer than a case.
    for layout, name, case in chosen:
        full_name = f"{context.world_size}-{layout.name}-{name}"
        if not re.search(only, full_name):
            continue
        error = None
        try:
            case(layout, context)
        except Exception:
            error = f"rank {os.environ.get('RANK', '0')}:\n{traceback.format_exc()}"
        # A trainer refers to itself. While it exists, so do its process groups, whose threads wake up all the time.
        gc.collect()
        errors: list[str | None] = [error]
        if context.world_size > 1:
            errors = [None] * context.world_size
            dist.all_gather_object(errors, error)
        failed = [e for e in errors if e]
        yield full_name, "\n".join(failed) or None


def share_one_gloo_device() -> None:
    """Let all process groups of this process share one device of gloo.

    Otherwise each group has its own device, with a thread that wakes up a hundred times a second while anything refers
    to the group. After many layouts there are hundreds of threads, which take a third of the machine.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    device = dist.ProcessGroupGloo.create_default_device()

    class SharingGloo(dist.ProcessGroupGloo):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = dist.ProcessGroupGloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharingGloo


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="", help="run the cases whose names hold this regular expression")
    args = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    is_writer = os.environ.get("RANK", "0") == "0"
    share_one_gloo_device()
    context = Context(assets=args.assets, shared=args.results.parent, world_size=world_size)
    results: dict[str, str | None] = {}
    start = time.perf_counter()
    for name, error in run_all(context, args.only):
        results[name] = error
        if is_writer:
            args.results.write_text(json.dumps(results))
            print(f"{time.perf_counter() - start:6.2f} s {'failed' if error else 'passed'} {name}", flush=True)
        start = time.perf_counter()
    if world_size == 1:
        (context.shared / "reference.json").write_text(json.dumps(context.recorded))


if __name__ == "__main__":
    main()
