"""The description of a bad input: the command that gets it, and what the command must say and leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bad_inputs.assets import Assets


@dataclass(frozen=True)
class Site:
    """The place where a case makes its bad input: an empty folder, which is also the command's working directory."""

    folder: Path
    assets: Assets

    def write(self, name: str, content: str | bytes) -> str:
        """Write a file. Returns its name, which is relative to the working directory."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def write_records(self, name: str, *records: object) -> str:
        """Write a jsonl file. Returns its name."""
        return self.write(name, "".join(json.dumps(record) + "\n" for record in records))

    def copy(self, source: Path, name: str) -> Path:
        """Copy a folder of the assets, to damage the copy. Returns the copy."""
        return shutil.copytree(source, self.folder / name)


Maker = Callable[[Site], Sequence[str]]
"""Makes a bad input and returns the command: a stage or the name of a tool, and its arguments."""


@dataclass(frozen=True)
class BadInput:
    """A bad input and its required result."""

    name: str
    """What is wrong, in words."""
    argv: Maker
    culprit: str
    """Regular expression of the mistake that the message must name."""
    cure: str
    """Regular expression of the cure that the message must give."""
    status: int = 2
    """Exit status."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""
    on_stdout: bool = False
    """Whether the problem is part of a report on stdout instead of a message on stderr."""
    has_several_lines: bool = False
    """Whether the message quotes lines of others, such as the traceback of a judge."""
    leaves: Sequence[str] = ()
    """Patterns of files and folders that may be left. None of them looks complete."""
    as_process: bool = False
    """Whether the command runs as its own process, as for a user. This is slow."""


UNFINISHED_RUN = ("saved", "saved/config.yaml", "saved/metrics.jsonl", "saved/events.out.*")
"""What is left of a run that stopped before its first checkpoint."""
UNFINISHED_PREPARATION = ("prepared.parts*",)
"""What is left of a preparation that stopped. The same command continues with it."""


def brain(*flags: str) -> Maker:
    return lambda site: site.assets.brain_on(str(site.assets.records("prompts")), *flags)


def generate(*flags: str) -> Maker:
    return lambda site: site.assets.generate_from(site.assets.policy, *flags)


def evaluate(*flags: str) -> Maker:
    return lambda site: site.assets.evaluate("--reward-load", str(site.assets.reward), *flags)
