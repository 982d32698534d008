"""Say what a checkpoint holds, and whether it is unchanged since it was saved.

    python tools/inspect_checkpoint.py CKPT [--tensors] [--finite] [--no-verify]

CKPT is a --save folder (its latest checkpoint) or one iter_NNNNNNN folder. Prints what it is, its run's position in the
data, the settings that are not the defaults, and its tensors; then compares everything with the checksums. Needs no
GPU, no process group, and the memory of one box of a tensor. Exit status 1: it is damaged, 2: there is no checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_brain.checkpointing import inspection, read_info
from megatron_brain.checkpointing.errors import CheckpointError, DamagedError
from megatron_brain.commands.reporting import reports_mistakes


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    args = _parse(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        info = read_info(args.checkpoint)
        console.print(inspection.describe(info, all_tensors=args.tensors), markup=False)
        if not args.verify:
            console.print("not compared with its checksums (--no-verify)")
            return 0
        found = inspection.examine(info, finite=args.finite)
    except (DamagedError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(str(found), markup=False)
    return int(bool(found.problems))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Say what a checkpoint holds, and whether it is still what was saved.")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a --save folder, or one iter_ folder of it")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not only kinds of them")
    parser.add_argument("--finite", action="store_true", help="look for values that are not finite, too")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare everything with its checksums [on]",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
