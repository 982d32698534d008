"""Runs every distributed case of one world size in one torchrun world and writes a result per case.

    torchrun --nproc-per-node 4 tests/distributed/world.py --assets DIR --results FILE [--only REGEX]

A case is a function `case_*(layout, context)` of a module cases_*.py; it runs once for every layout of the world's
size on all ranks and fails if any rank raises. One process (size 1) runs first and leaves what `context.reference`
gives the others to compare with. `python tests/distributed/world.py --list` names what each size runs.
"""

import argparse
import importlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Layout:
    """A layout to run a case at. Data parallelism is what is left of the world."""

    name: str
    tp: int = 1
    pp: int = 1
    sp: bool = False
    layers_per_virtual_stage: int | None = None

    def flags(self) -> list[str]:
        """The layout as command-line flags."""
        flags = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        if self.sp:
            flags.append("--sequence-parallel")
        if self.layers_per_virtual_stage:
            flags += ["--num-layers-per-virtual-pipeline-stage", str(self.layers_per_virtual_stage)]
        return flags


LAYOUTS: dict[int, list[Layout]] = {
    1: [Layout("single")],
    2: [
        Layout("tp2", tp=2),
        Layout("tp2_sp", tp=2, sp=True),
        Layout("pp2", pp=2),
        Layout("pp2_interleaved", pp=2, layers_per_virtual_stage=1),
        Layout("dp2"),
    ],
    4: [
        Layout("tp2_pp2", tp=2, pp=2),
        Layout("tp2_dp2", tp=2),
        Layout("pp2_dp2", pp=2),
        Layout("tp2_sp_pp2", tp=2, pp=2, sp=True),
        Layout("dp4"),
    ],
}


@dataclass
class Context:
    """What a case may use: the assets, a folder all ranks share, and what one process computed."""

    assets: Path
    shared: Path
    world_size: int
    recorded: dict[str, object] = field(default_factory=dict)

    def reference(self, name: str, value: object) -> object:
        """One process records `value` under a name; every other world is given it back."""
        if self.world_size == 1:
            self.recorded[name] = value
            return value
        return self.expected(name)

    def expected(self, name: str) -> object:
        """What one process recorded under a name, also in the one process's own world."""
        if self.world_size == 1:
            return self.recorded[name]
        return json.loads((self.shared / "reference.json").read_text())[name]


Case = Callable[[Layout, Context], None]


def cases() -> dict[str, Case]:
    """All cases by name."""
    found: dict[str, Case] = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        module = importlib.import_module(f"distributed.{path.stem}")
        found |= {f"{path.stem[6:]}.{name[5:]}": f for name, f in vars(module).items() if name.startswith("case_")}
    return found


def case_names() -> list[str]:
    """Names `size-layout-module.case` of everything that runs, without importing torch."""
    names = []
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        functions = [
            line.split("(")[0].removeprefix("def case_")
            for line in path.read_text().splitlines()
            if line.startswith("def case_")
        ]
        names += [f"{path.stem[6:]}.{function}" for function in functions]
    return [f"{size}-{layout.name}-{name}" for size, layouts in LAYOUTS.items() for layout in layouts for name in names]


def run_all(context: Context, only: str = "") -> Iterator[tuple[str, str | None]]:
    """Run everything of this world's size; yields a case's name and its error on any rank."""
    import torch.distributed as dist

    for layout in LAYOUTS[context.world_size]:
        for name, case in cases().items():
            if not re.search(only, name):
                continue
            error = None
            try:
                case(layout, context)
            except Exception:
                error = f"rank {os.environ.get('RANK', '0')}:\n{traceback.format_exc()}"
            errors: list[str | None] = [error]
            if context.world_size > 1:
                errors = [None] * context.world_size
                dist.all_gather_object(errors, error)
            failed = [e for e in errors if e]
            yield f"{context.world_size}-{layout.name}-{name}", "\n".join(failed) or None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="", help="run the cases whose names hold this regular expression")
    args = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    context = Context(assets=args.assets, shared=args.results.parent, world_size=world_size)
    results: dict[str, str | None] = {}
    for name, error in run_all(context, args.only):
        results[name] = error
        if os.environ.get("RANK", "0") == "0":
            args.results.write_text(json.dumps(results))
    if world_size == 1:
        (context.shared / "reference.json").write_text(json.dumps(context.recorded))


if __name__ == "__main__":
    main()
