"""Convert a Hugging Face model to a checkpoint.

    python tools/convert_hf_to_megatron.py --hf-model DIR --save CKPT [--bf16]

A language model becomes a policy, a `*ForSequenceClassification` with one label a reward model. The checkpoint is read
back and compared with transformers on random tokens; past --tolerance the tool exits with status 1 and leaves
CKPT.unverified to look at. Runs as one process; the checkpoint loads at any layout.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_brain.checkpointing import CheckpointSaver, TrainingState, load_weights, read_info
from megatron_brain.config.data import TokenizerConfig
from megatron_brain.config.errors import ConfigError
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.conversion import load_hf_weights, read_hf_model
from megatron_brain.conversion.compare import Comparison, MismatchError, compare_with_hf
from megatron_brain.conversion.output_folder import verified_folder
from megatron_brain.data.tokenizer import TOKENIZER_TYPES, build_tokenizer, check_fits
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model
from megatron_brain.runtime import parallel


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
    """Convert, read back and compare.

    Raises:
        ValueError: the model or its tokenizer cannot be converted, or --save is not empty.
        MismatchError: the two models differ.
    """
    if parallel.launched_world_size() > 1:
        raise ConfigError("conversion runs as one process: start it without torchrun")
    source = read_hf_model(args.hf_model)
    model = resolve(ModelConfig(hf_model=str(args.hf_model), bf16=args.bf16), source.architecture, str(args.hf_model))
    settings = TokenizerConfig(
        tokenizer_type=args.tokenizer_type, tokenizer_model=str(args.tokenizer_model or args.hf_model)
    )
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    check_fits(tokenizer, model.vocab_size)
    config = RunConfig(stage="sft" if source.head == "policy" else "reward", model=model, tokenizer=settings)
    with verified_folder(args.save) as folder:
        place = parallel.start(ParallelConfig(), seed=config.training.seed)
        chunks = build_model(model, config.parallel, place, head=source.head, seed=config.training.seed)
        load_hf_weights(args.hf_model, chunks, model, source.head)
        CheckpointSaver(folder, config, place, tokenizer, head=source.head).save(0, chunks, TrainingState())
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.fill_(torch.nan)
        load_weights(read_info(folder), chunks, head=source.head)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        comparison = compare_with_hf(args.hf_model, chunks[0], model, source.head, tokenizer, dtype)
        comparison.require(args.tolerance)
    return comparison


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face model to a checkpoint, and compare the two.")
    parser.add_argument("--hf-model", type=Path, required=True, help="directory of the Hugging Face model")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--bf16", action="store_true", help="write bfloat16 weights instead of float32")
    parser.add_argument("--tokenizer-type", choices=tuple(TOKENIZER_TYPES), default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer of the checkpoint [that of --hf-model]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed [1e-4]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    parallel.stop()
    sys.exit(status)
