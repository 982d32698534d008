"""Conversion of a large model in both directions, against a plain copy of the same files.

    python tools/benchmark.py convert --gigabytes 8 --processes 1

Writes a random Llama in bfloat16 in shards, in Hugging Face's format. Each direction is then timed in turns with
`shutil.copyfile` and `fsync` of the files that it reads, pair after pair in alternating order, without the comparison
with transformers; then once with the comparison, for its time and the peak of memory. The files that come out are
compared with those that went in. Everything is written under one temporary folder and removed.

The tool reports the seconds of a conversion, from the first byte read to the rename. The seconds of the whole process,
which also starts Python and imports torch and transformers, are given too.
"""

import argparse
import filecmp
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from benchmarks.models import write_tokenizer
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.registry import family_for_export
from megatron_brain.conversion.safetensors_files import INDEX
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import resolve

REQUIRED = 0.6
"""Least speed that is required, relative to a copy."""

_TOOLS = Path(__file__).parents[1]
_WEIGHTS = "*.safetensors"
_SECONDS = re.compile(r" GB in ([\d.]+) s")
_COMPARED = re.compile(r"difference of the logits .*: ([\d.e+-]+) \(.*, ([\d.]+) s$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the model, at least")
    parser.add_argument("--max-shard-size", default="2GB")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--directory", type=Path, help="folder to write in, with 4 times the size free [a temporary one]"
    )


def run(args: argparse.Namespace) -> dict:
    """Measure.

    Returns:
        to_checkpoint, to_hf: `ratio`, the median over pairs of the copy's seconds / the conversion's, and the same for
        the whole process; medians of seconds; `peak_bytes` of each process with the comparison. peak_limit_bytes: their
        limit. failures: files that did not come back equal, and peaks beyond the limit.
    """
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        root = Path(folder)
        if shutil.disk_usage(root).free < 4e9 * args.gigabytes:
            raise ConfigError(f"{root} has less than {4 * args.gigabytes:.0f} GB free: give --directory or --gigabytes")
        model = _write_model(root / "hf", args)
        limit = 2 * max(file.stat().st_size for file in (root / "hf").glob(_WEIGHTS)) + 10**9
        conversions = [
            _Conversion("to_checkpoint", "convert_hf_to_megatron", root / "hf", root / "checkpoint", ("--bf16",)),
            _Conversion(
                "to_hf",
                "convert_megatron_to_hf",
                root / "checkpoint",
                root / "out",
                ("--max-shard-size", args.max_shard_size),
            ),
        ]
        measured = {conversion.name: conversion.measure(args) for conversion in conversions}
        failures = differences(root / "hf", root / "out")
    for name, figures in measured.items():
        if max(figures["peak_bytes"]) > limit:
            failures.append(f"{name}: a process took {max(figures['peak_bytes'])} bytes, allowed are {limit}")
    return {"required": REQUIRED, "model": model, "peak_limit_bytes": limit, **measured, "failures": failures}


@dataclass(frozen=True)
class _Conversion:
    """A tool, the files that it reads and the folder that it writes."""

    name: str
    tool: str
    source: Path
    target: Path
    flags: tuple[str, ...]

    def measure(self, args: argparse.Namespace) -> dict:
        """Time it in turns with a copy, then run it once with the comparison and keep what that wrote."""
        copies, conversions = [], []
        for number in range(1, args.pairs + 1):
            steps = [
                lambda: copies.append(self._copy()),
                lambda: conversions.append(self._convert(args, "--no-compare")),
            ]
            for step in steps if number % 2 else reversed(steps):
                step()
            print(f"{self.name} {number}/{args.pairs}: copy {copies[-1]:.2f} s, {conversions[-1]}", file=sys.stderr)
        compared = self._convert(args, keep=True)
        return {
            "ratio": statistics.median(copy / run.seconds for copy, run in zip(copies, conversions, strict=True)),
            "process_ratio": statistics.median(
                copy / run.process_seconds for copy, run in zip(copies, conversions, strict=True)
            ),
            "copy_seconds": statistics.median(copies),
            "seconds": statistics.median(run.seconds for run in conversions),
            "process_seconds": statistics.median(run.process_seconds for run in conversions),
            "comparison_seconds": compared.comparison_seconds,
            "difference": compared.difference,
            "peak_bytes": compared.peak_bytes,
            "peak_bytes_without_comparison": max(peak for run in conversions for peak in run.peak_bytes),
        }

    def _copy(self) -> float:
        """Seconds to copy the files of weights that the tool reads, and to sync the copies."""
        target = self.target.with_name("copy")
        target.mkdir()
        started = time.perf_counter()
        for file in sorted(self.source.rglob(_WEIGHTS)):
            shutil.copyfile(file, target / file.name)
            with (target / file.name).open("rb") as copied:
                os.fsync(copied.fileno())
        seconds = time.perf_counter() - started
        shutil.rmtree(target)
        return seconds

    def _convert(self, args: argparse.Namespace, *flags: str, keep: bool = False) -> "Run":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
        source = "--hf-model" if self.name == "to_checkpoint" else "--load"
        with tempfile.TemporaryDirectory() as peaks:
            command = [
                sys.executable,
                *(launcher if args.processes > 1 else []),
                str(Path(__file__).with_name("peak_memory.py")),
                peaks,
                str(_TOOLS / f"{self.tool}.py"),
                *(source, str(self.source), "--save", str(self.target)),
                *(*self.flags, *flags),
            ]
            started = time.perf_counter()
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - started
            peak_bytes = [int(file.read_text()) for file in sorted(Path(peaks).iterdir())]
        if ran.returncode:
            raise RuntimeError(f"{self.tool} failed: {ran.stderr}")
        if not keep:
            shutil.rmtree(self.target)
        return Run.of(ran.stdout, seconds, peak_bytes)


@dataclass(frozen=True)
class Run:
    """Time and memory of a run of a tool. The figures of the comparison are None where there was none."""

    seconds: float
    process_seconds: float
    peak_bytes: list[int]
    difference: float | None
    comparison_seconds: float | None

    @classmethod
    def of(cls, said: str, seconds: float, peak_bytes: list[int]) -> "Run":
        """Read the figures from the tool's last line."""
        compared = _COMPARED.search(said)
        return cls(
            seconds=float(_SECONDS.search(said)[1]),
            process_seconds=round(seconds, 2),
            peak_bytes=peak_bytes,
            difference=float(compared[1]) if compared else None,
            comparison_seconds=float(compared[2]) if compared else None,
        )


def _write_model(directory: Path, args: argparse.Namespace) -> dict:
    """Write a random Llama with one shard in memory at a time, and return its sizes."""
    model = _sizes(args.gigabytes * 1e9)
    family = family_for_export(model)
    directory.mkdir()
    config = {"architectures": [family.policy_class], **family.hf_config(model), "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    shapes = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in family.tensors(model, "policy")
    }
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=args.max_shard_size
    )
    noise = torch.empty(2**25, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    offsets = random.Random(1)
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), start=1):
        print(f"writing shard {number}/{len(split.filename_to_tensors)}", file=sys.stderr)
        shard = {name: _random(shapes[name].shape, noise, offsets) for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index))
    # Otherwise the disk would still write them while conversions are timed.
    os.sync()
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    files = {"bytes": split.metadata["total_size"], "shards": len(split.filename_to_tensors)}
    return {**{name: getattr(model, name) for name in sizes}, **files}


def _random(shape: torch.Size, noise: torch.Tensor, offsets: random.Random) -> torch.Tensor:
    """A random piece of `noise`, which is faster than new random numbers; the weights of norms are around 1."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for piece in tensor.view(-1).split(len(noise) // 2):
        start = offsets.randrange(len(noise) // 2)
        piece.copy_(noise[start : start + len(piece)])
    return tensor + 1 if len(shape) == 1 else tensor


def _sizes(nbytes: float) -> ModelConfig:
    """Sizes of a Llama of at least so many bytes in bfloat16, with the width of Llama 3 8B or a quarter of it."""
    width = 4096 if nbytes >= 4e9 else 1024
    of_layer = 2 * (2 * width**2 + 2 * width * width // 4 + 3 * width * 7 * width // 2)
    return resolve(
        ModelConfig(
            num_layers=max(1, math.ceil((nbytes - 2 * 2 * 32000 * width) / of_layer)),
            hidden_size=width,
            ffn_hidden_size=7 * width // 2,
            num_attention_heads=width // 128,
            num_query_groups=width // 512,
            vocab_size=32000,
            untie_embeddings_and_output_weights=True,
        ),
        None,
        "the benchmark",
    )


def differences(before: Path, after: Path) -> list[str]:
    """Names of the files of weights that differ in any byte, and of an index that differs."""
    names = {file.name for folder in (before, after) for file in folder.glob(_WEIGHTS)}
    _, wrong, missing = filecmp.cmpfiles(before, after, names, shallow=False)
    failures = [f"{name} did not come back as it was" for name in sorted(wrong + missing)]
    if (before / INDEX).exists():
        maps = [json.loads((folder / INDEX).read_text())["weight_map"] for folder in (before, after)]
        failures += [] if maps[0] == maps[1] else [f"{INDEX} names other files"]
    return failures
