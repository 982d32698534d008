"""A step of a plan: one command that a user could type, with what it needs and what it leaves behind."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import ROOT, Flags

import megatron_brain

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "THP_MEM_ALLOC_ENABLE": "1"}
"""One thread a process, as there is a process for each core. Huge pages help, as each step allocates large tensors."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command. It runs in the checkout, with its output in `WORK/log/NAME.log`."""

    name: str
    """Unique, such as `shared/sft` or `baseline/none-k8/seed1/brain`."""
    kind: str
    """What it is for estimates of time: `sft`, `brain`, `evaluate` and so on."""
    command: tuple[str, ...]
    """It starts with `python` or `torchrun`."""
    needs: tuple[str, ...] = ()
    """Names of the steps that must be finished before."""
    loads: tuple[str, ...] = ()
    """Those of its needs whose checkpoints it loads."""
    reads: tuple[Path, ...] = ()
    """Files of the checkout, settings and scripts, whose contents decide the result."""
    outputs: tuple[Path, ...]
    """Files that are there once the step is finished."""
    digests: tuple[Path, ...] = ()
    """Those of its outputs whose contents the later steps depend on, because the command does not determine them."""
    fresh: tuple[Path, ...] = ()
    """Files and folders of its own that are removed before it starts anew."""
    iterations: int | None = None
    """Of a training stage: its last iteration. A run that was stopped has a checkpoint of an earlier one."""
    checkpoint: Path | None = None
    """Of a training stage: the folder of its checkpoints."""
    resumes: bool = False
    """Whether a stopped step goes on from its checkpoint. Others start anew."""
    may_diverge: bool = False
    """Whether it is over, too, once it has ended with a FloatingPointError: its numbers were not finite any more."""
    takes_diverged: bool = False
    """Whether it starts although steps that it needs have diverged."""
    slots: int = 1
    """Processes that it has."""
    minutes: float
    """How long it should take."""
    environment: Mapping[str, str]


def flag_words(flags: Flags) -> list[str]:
    """Words of a command line; a flag with null is left out."""
    words: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def sources_of(script: Path) -> tuple[Path, ...]:
    """A script, and the modules in its folder that it imports, and so on."""
    found, left = [], [script]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.append(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            left += [place for name in names if (place := script.parent / f"{name}.py").exists()]
    return tuple(sorted(found))


def own_identity(step: Step, work: Path) -> dict[str, Any]:
    """What decides the result of a step, without the results of those it needs.

    Args:
        work: the folder of results. It is called WORK in what is returned, so that it can be moved.
    """
    return {
        "megatron_brain": megatron_brain.__version__,
        "command": [word.replace(str(work), "WORK") for word in step.command],
        "reads": {str(path.relative_to(ROOT)): file_hash(path) for path in step.reads},
    }


def result_hash(identity: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """SHA-256 of what decided a step's result, and of the outputs that it does not determine."""
    text = json.dumps([identity, digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
