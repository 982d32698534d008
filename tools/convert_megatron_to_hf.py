"""Convert a checkpoint to a Hugging Face model.

    python tools/convert_megatron_to_hf.py --load CKPT --save DIR [--dtype bfloat16]

A policy becomes a language model, a reward model a `*ForSequenceClassification` with one label. What was written is
compared with the checkpoint on random tokens; past --tolerance the tool exits with status 1 and leaves DIR.unverified
to look at. Runs as one process, whatever layout the checkpoint was saved at.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_brain.checkpointing import load_weights, read_info
from megatron_brain.config.errors import ConfigError
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.conversion import export_hf
from megatron_brain.conversion.compare import Comparison, MismatchError, compare_with_hf
from megatron_brain.conversion.output_folder import verified_folder
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model
from megatron_brain.runtime import parallel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 where the two models differ, 2 for a mistake in what was asked for."""
    args = _parse(argv)
    started = time.monotonic()
    try:
        comparison = convert(args)
    except MismatchError as error:
        print(f"error: {args.save}.unverified: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.save}: {comparison} (tolerance {args.tolerance:.0e}); {time.monotonic() - started:.1f} s")
    return 0


def convert(args: argparse.Namespace) -> Comparison:
    """Write the Hugging Face directory and compare.

    Raises:
        ValueError: there is no checkpoint, transformers cannot express it, or --save is not empty.
        MismatchError: the two models differ.
    """
    if parallel.launched_world_size() > 1:
        raise ConfigError("conversion runs as one process: start it without torchrun")
    info = read_info(args.load)
    dtype = _DTYPES[args.dtype or ("bfloat16" if info.bf16 else "float32")]
    model = resolve(ModelConfig(bf16=info.bf16), info.architecture, str(info.path))
    tokenizer = build_tokenizer(info.tokenizer_type, info.tokenizer_dir)
    with verified_folder(args.save) as folder:
        place = parallel.start(ParallelConfig(), seed=0)
        chunks = build_model(model, ParallelConfig(), place, head=info.head, seed=0)
        load_weights(info, chunks, head=info.head)
        export_hf(folder, chunks, model, info.head, tokenizer, dtype, place)
        comparison = compare_with_hf(folder, chunks[0], model, info.head, tokenizer, dtype)
        comparison.require(args.tolerance)
    return comparison


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a Hugging Face model, and compare the two.")
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder, or one iter_ folder of it")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="type of the written weights [the checkpoint's]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed [1e-4]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    parallel.stop()
    sys.exit(status)
