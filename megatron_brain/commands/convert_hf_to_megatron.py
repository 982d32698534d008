"""Convert a Hugging Face model to a checkpoint.

    python tools/convert_hf_to_megatron.py --hf-model DIR --save CKPT [--bf16]
    torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py ...

A language model becomes a policy; a `*ForSequenceClassification` with one label becomes a reward model. The checkpoint
loads at any layout. The tool compares it with transformers on random tokens; past --tolerance it exits with status 1
and keeps CKPT.unverified. Only a part of the weights is in memory at one time, and several processes share the work.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_brain.config.data import TokenizerConfig
from megatron_brain.conversion import command
from megatron_brain.conversion.to_checkpoint import ToCheckpoint
from megatron_brain.data.tokenizer import TOKENIZER_TYPES
from megatron_brain.runtime import parallel


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 where the two models differ, 2 for a mistake of the user."""
    args = _parse(argv)
    tokenizer = TokenizerConfig(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=str(args.tokenizer_model or args.hf_model),
        chat_template=args.chat_template,
    )
    return command.run(args, args.hf_model, lambda: ToCheckpoint(args.hf_model, bf16=args.bf16, tokenizer=tokenizer))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face model to a checkpoint, and compare the two.")
    parser.add_argument("--hf-model", type=Path, required=True, help="directory of the Hugging Face model")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--bf16", action="store_true", help="write bfloat16 weights instead of float32")
    parser.add_argument("--tokenizer-type", choices=tuple(TOKENIZER_TYPES), default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer of the checkpoint [that of --hf-model]")
    parser.add_argument("--chat-template", help="Jinja file that replaces the tokenizer's chat template")
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
