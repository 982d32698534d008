"""Measure the speed and memory that this package promises.

    python tools/benchmark.py SUBJECT [--output FILE] [--flag value ...]

Prints one JSON object on standard output and its progress on standard error. `SUBJECT --help` lists the flags of a
subject. Exit status 1: a subject found wrong results in what it timed ("failures" in the JSON); 2: a mistake of the
user. A time that misses its requirement is reported, but is no failure.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.errors import ConfigError
from megatron_brain.files import write_whole
from megatron_brain.runtime import parallel

SUBJECTS = {
    "update": "a BRAIn update and scoring against the same on transformers, and their cost by tokens",
    "logprobs": "log-probabilities of response tokens without whole logits",
    "convert": "conversion of a large model in and out, against a copy of the same files",
    "checkpoint": "what a save in the background takes from training, against a synchronous one",
    "fp8": "what FP8 does to log-probabilities, importance weights and the gradient of BRAIn",
    "sample": "tokens a second of sampling, against transformers and vLLM",
    "round": "a whole round of BRAIn, against a step of TRL's GRPOTrainer",
    "sft": "a step of supervised fine-tuning, against TRL's SFTTrainer",
    "reward": "a step of reward modelling, against TRL's RewardTrainer",
    "memory": "the planner's estimate of memory against the measured peak of training steps",
}
"""Modules of tools/benchmarks, each with `add_arguments(parser)` and `run(args) -> dict`."""


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Run a subject. Returns the exit status."""
    if not argv or argv[0] not in SUBJECTS:
        asked_for_help = bool(argv) and argv[0] in ("-h", "--help")
        print(_usage(argv), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    subject = _import(argv[0])
    parser = argparse.ArgumentParser(prog=f"benchmark.py {argv[0]}", description=subject.__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    subject.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    before = os.getloadavg()[0]
    # Otherwise the prints of a model or a library would be in the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        measured = subject.run(args)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"subject": argv[0], "settings": settings, "environment": _environment(before), **measured}
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        write_whole(args.output, text + "\n")
    for failure in report.get("failures", []):
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if report.get("failures") else 0


def _import(subject: str) -> ModuleType:
    """The module of a subject.

    Raises:
        ConfigError: a package that it compares with is not installed.
    """
    try:
        return importlib.import_module(f"benchmarks.{subject}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{subject} needs {error.name}, which is not installed: pip install {error.name}") from error


def _usage(argv: Sequence[str]) -> str:
    wrong = [f"error: unknown subject {argv[0]!r}", ""] if argv and not argv[0].startswith("-") else []
    subjects = [f"  {name:10}{what}" for name, what in SUBJECTS.items()]
    return "\n".join([*wrong, "usage: python tools/benchmark.py SUBJECT [--output FILE] [--flag ...]", "", *subjects])


def _environment(load_before: float) -> dict:
    """What the figures depend on. A load above the number of threads before the start means a busy machine."""
    packages = ("torch", "megatron.core", "transformers")
    return {
        "versions": {name: importlib.import_module(name).__version__ for name in packages},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(load_before, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return model or platform.processor() or platform.machine()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    parallel.stop()
    sys.exit(status)
