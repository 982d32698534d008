"""Runs a command in this process, as its `__main__` does, or as its own process. Returns what it said and left."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megatron_brain import __main__ as command_line
from megatron_brain.config.stage_spec import stages
from megatron_brain.runtime.launch import _LAUNCHERS

ROOT = Path(__file__).parents[2]

LAUNCHER_VARIABLES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(name for launcher in _LAUNCHERS for name in (launcher.rank, *launcher.size, launcher.needs) if name),
}
"""Variables that make a process one of several."""

_LOG = re.compile(r"(INFO|WARNING) megatron_brain\.|\[transformers\] |\S+: part \d+ written$")
"""Lines of a log, which may come before a message."""
_USAGE = re.compile(r"^usage: .*\n( +.*\n)*", re.MULTILINE)
"""The usage that argparse prints in a tool before its message."""
_MESSAGE = re.compile(r"^(?:[\w.]+: )?error: ", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one message on stderr, with everything that follows its beginning."""
        starts = [found.start() for found in _MESSAGE.finditer(self.err)]
        assert len(starts) == 1, f"{len(starts)} messages"
        return self.err[starts[0] :]

    @property
    def strange_lines(self) -> list[str]:
        """Lines on stderr before the message that are not lines of a log."""
        before = self.err[: len(self.err) - len(self.message)] if _MESSAGE.search(self.err) else self.err
        return [line for line in _USAGE.sub("", before).splitlines() if not _LOG.match(line)]


def run_here(argv: Sequence[str]) -> int:
    """Exit status of a stage or a tool that runs in this process. Its log goes to stderr."""
    root, package = logging.getLogger(), logging.getLogger("megatron_brain")
    handlers, level, program = root.handlers[:], package.level, sys.argv[0]
    root.handlers.clear()  # With handlers, logging.basicConfig of the command would do nothing.
    sys.argv[0] = f"{argv[0]}.py"  # In a tool argparse begins its message with this.
    try:
        if argv[0] in stages():
            return command_line.main(argv)
        return _tool(argv[0]).main(argv[1:])
    except SystemExit as stopped:  # argparse raises it in a tool.
        return stopped.code
    finally:
        root.handlers[:] = handlers
        package.setLevel(level)
        sys.argv[0] = program


def run_apart(argv: Sequence[str], environment: Mapping[str, str]) -> Outcome:
    """Run a stage or a tool as its own process, in the working directory."""
    command = ["-m", "megatron_brain", *argv] if argv[0] in stages() else [_path(argv[0]), *argv[1:]]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, str]:
    """All files and folders below a folder, with their contents."""
    return {path.relative_to(folder).as_posix(): _contents(path) for path in sorted(folder.rglob("*"))}


def _contents(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"


def _path(tool: str) -> Path:
    return ROOT / "tools" / f"{tool}.py"


def _tool(name: str) -> ModuleType:
    return importlib.import_module(f"megatron_brain.commands.{name}")
