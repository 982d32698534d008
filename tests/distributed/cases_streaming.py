"""Several processes convert what one process converts, and stop together."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.hf_models import build_hf_model
from safetensors.torch import load_file

from distributed.world import Context, Layout, at


@at(lambda layout: layout.name == "dp2")
def case_processes_share_the_files_and_stop_together(layout: Layout, context: Context) -> None:
    """Each writes some files, and together they are the model. All name a process that fails."""
    from megatron_brain.conversion import command, to_hf
    from megatron_brain.conversion.errors import ConversionError
    from megatron_brain.conversion.output_folder import verified_folder
    from megatron_brain.conversion.workers import Workers
    from megatron_brain.errors import ConfigError

    workers = Workers()
    root = context.shared / f"streaming_{context.world_size}"
    source, checkpoint = root / "hf", root / "checkpoint"
    workers.first(lambda: write_hf(source, context))
    convert(to_checkpoint_of(source), checkpoint, workers)
    write, written = to_hf.write_safetensors, []

    def note(tensors, path, **options):
        written.append(path.name)
        write(tensors, path, **options)

    with replaced(to_hf, "write_safetensors", note):
        convert(to_hf_of(checkpoint), root / "out", workers)
    by_rank = workers.gather(written)
    assert all(by_rank)
    assert sum(map(len, by_rank)) == len(list((root / "out").glob("*.safetensors"))) > 2
    before, after = load_file(source / "model.safetensors"), all_tensors(root / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    def missing(folder: Path, pattern: str) -> None:
        raise FileNotFoundError(folder)

    # When the others look, the first may already have given the folder its final name.
    look = Path.rglob if workers.is_first else missing
    with replaced(Path, "rglob", look):
        args = argparse.Namespace(save=root / "named", no_compare=True)
        assert command.run(args, checkpoint, to_hf_of(checkpoint)) == 0
    assert (root / "named" / "config.json").exists()
    last = context.world_size - 1

    def refuse(*args, **options):
        raise OSError("no space")

    said = f"^rank {last}: OSError: no space$" if last else "^OSError: no space$"
    write = refuse if workers.parallel.rank == last else write
    with replaced(to_hf, "write_safetensors", write), pytest.raises(ConversionError, match=said):
        convert(to_hf_of(checkpoint), root / "refused", workers)
    assert not (root / "refused").exists()
    assert not (root / "refused.unverified" / "config.json").exists()
    with pytest.raises(ConfigError, match="^--save .* exists and is not empty"), verified_folder(checkpoint, workers):
        pass


def convert(conversion, folder: Path, workers) -> None:
    from megatron_brain.conversion.output_folder import verified_folder

    with verified_folder(folder, workers) as unverified:
        workers.all(conversion).write(unverified, workers, lambda amount: None)


def to_checkpoint_of(source: Path):
    from megatron_brain.config.data import TokenizerConfig
    from megatron_brain.conversion.to_checkpoint import ToCheckpoint

    tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(source))
    return lambda: ToCheckpoint(source, bf16=False, tokenizer=tokenizer)


def to_hf_of(checkpoint: Path):
    from megatron_brain.conversion.to_hf import ToHF

    return lambda: ToHF(checkpoint, dtype=None, max_shard_size="20KB", hf_model_type=None)


def write_hf(directory: Path, context: Context) -> None:
    build_hf_model("llama").save_pretrained(directory)
    for file in (context.assets / "tokenizer").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


@contextmanager
def replaced(module: ModuleType, name: str, function: Callable) -> Iterator[None]:
    """Inside the context, a function of a module is replaced."""
    right = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, right)
