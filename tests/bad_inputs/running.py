"""Runs a command in this process as its `__main__` would, or as a process of its own; tells what it said and left."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_brain import __main__ as stages
from megatron_brain.config.run import STAGE_SECTIONS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What came of a command."""

    status: int
    out: str
    err: str


def run_here(argv: Sequence[str]) -> int:
    """Exit status of a stage or a tool that runs in this process, its log on stderr."""
    root, package = logging.getLogger(), logging.getLogger("megatron_brain")
    handlers, level = root.handlers[:], package.level
    root.handlers.clear()  # else logging.basicConfig of the command would do nothing
    try:
        if argv[0] in STAGE_SECTIONS:
            return stages.main(argv)
        return _tool(argv[0]).main(argv[1:])
    except SystemExit as stopped:  # argparse, of a tool
        return stopped.code
    finally:
        root.handlers[:] = handlers
        package.setLevel(level)


def run_apart(argv: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Outcome:
    """A stage or a tool as a process of its own."""
    command = ["-m", "megatron_brain", *argv] if argv[0] in STAGE_SECTIONS else [_path(argv[0]), *argv[1:]]
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=everything, capture_output=True, text=True, timeout=120
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, str]:
    """All files and folders below a folder, with what they hold."""
    return {path.relative_to(folder).as_posix(): _contents(path) for path in sorted(folder.rglob("*"))}


def _contents(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


def _path(tool: str) -> Path:
    return ROOT / "tools" / f"{tool}.py"


def _tool(name: str):
    module = sys.modules.get(f"tools.{name}")
    if module is None:
        spec = importlib.util.spec_from_file_location(f"tools.{name}", _path(name))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[f"tools.{name}"] = module
    return module
