"""Convert between Hugging Face models and checkpoints, in either direction.

    megatron-brain-convert hf-to-megatron --hf-model DIR --save CKPT [--bf16]
    megatron-brain-convert megatron-to-hf --load CKPT --save DIR [--dtype bfloat16]
    torchrun --nproc-per-node 4 -m megatron_brain.commands.convert hf-to-megatron ...

The flags of a direction are those of `convert_hf_to_megatron` and `convert_megatron_to_hf`.
"""

import importlib
import sys

_DIRECTIONS = {
    "hf-to-megatron": ("convert_hf_to_megatron", "write a checkpoint from a Hugging Face model"),
    "megatron-to-hf": ("convert_megatron_to_hf", "write a Hugging Face model from a checkpoint"),
}


def entry() -> int:
    """The console script `megatron-brain-convert`. Returns the exit status of the direction, or 2 without one."""
    program, *arguments = sys.argv
    if not arguments or arguments[0] not in _DIRECTIONS:
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        print(_usage(arguments), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    direction, *flags = arguments
    # argparse begins its usage line with the program's name.
    sys.argv = [f"{program} {direction}", *flags]
    status: int = importlib.import_module(f"megatron_brain.commands.{_DIRECTIONS[direction][0]}").entry()
    return status


def _usage(arguments: list[str]) -> str:
    wrong = [f"error: unknown direction {arguments[0]!r}", ""] if arguments and not arguments[0].startswith("-") else []
    directions = [f"  {name:16}{what}" for name, (_, what) in _DIRECTIONS.items()]
    usage = "usage: megatron-brain-convert DIRECTION [--flag value ...]"
    return "\n".join([*wrong, usage, "", *directions, "", "DIRECTION --help lists the flags of a direction."])


if __name__ == "__main__":
    sys.exit(entry())
