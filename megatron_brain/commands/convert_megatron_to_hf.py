"""Convert a checkpoint to a Hugging Face model.

    python tools/convert_megatron_to_hf.py --load CKPT --save DIR [--dtype bfloat16]
    torchrun --nproc-per-node 4 tools/convert_megatron_to_hf.py ...

A policy becomes a language model; a reward model becomes a `*ForSequenceClassification` with one label. The checkpoint
may have any layout. The tool compares it with the result on random tokens; past --tolerance it exits with status 1 and
keeps DIR.unverified. Only one shard's weights are in memory at one time, and several processes share the work.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_brain.conversion import command
from megatron_brain.conversion.registry import FAMILIES
from megatron_brain.conversion.to_hf import ToHF
from megatron_brain.runtime import parallel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 where the two models differ, 2 for a mistake of the user."""
    args = _parse(argv)

    def prepare() -> ToHF:
        return ToHF(
            args.load,
            dtype=_DTYPES.get(args.dtype),
            max_shard_size=args.max_shard_size,
            hf_model_type=args.hf_model_type,
            chat_template=args.chat_template,
            verify=args.verify,
            untie=args.untie,
        )

    return command.run(args, args.load, prepare)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a Hugging Face model, and compare the two.")
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder, or one iter_ folder of it")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="type of the written weights [the checkpoint's]")
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of a file of weights [5GB]")
    parser.add_argument(
        "--hf-model-type",
        choices=sorted(family.model_type for family in FAMILIES),
        help="family to write [the one it was converted from, else the first that can express the model]",
    )
    parser.add_argument("--chat-template", help="Jinja file that replaces the checkpoint's chat template")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare what is read with its checksums [on]",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="write the output layer of a tied model too, as inference servers need it to take over new weights",
    )
    command.add_arguments(parser)
    return parser.parse_args(argv)


def entry() -> int:
    """The command itself: runs `main` with the command line, then ends the process group."""
    try:
        return main(sys.argv[1:])
    finally:
        parallel.stop()


if __name__ == "__main__":
    sys.exit(entry())
