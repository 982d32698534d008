"""Report every problem of a data set before a long job starts.

    python tools/check_data.py --stage sft --input train.jsonl --valid valid.jsonl --hf-model DIR --seq-length 1024

Errors would stop the stage; warnings are about records that it would train on. Exit status: 0 without errors (with
--strict: without warnings too), 1 with some, 2 for a mistake of the user, or a worker process that was killed.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_brain.commands.reading_flags import add_reading_flags, reading_settings
from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.data.checking import check
from megatron_brain.flag_types import positive


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    args = _parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    reading = reading_settings(args)
    reading.build()  # first, because a mistake in the settings is not a problem of the data
    report = check(
        args.input,
        args.valid,
        reading,
        split=args.split,
        valid_split=args.valid_split,
        workers=args.workers,
        max_shown=args.max_shown,
    )
    print(report)
    return int(report.total(errors=True) > 0 or (args.strict and report.total(errors=False) > 0))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Report every problem of a data set before a long job starts.")
    parser.add_argument("--input", nargs="+", required=True, help="records to train on, as a stage's --train-data")
    parser.add_argument("--valid", nargs="+", default=[], help="records to validate on, compared with --input")
    parser.add_argument("--split", help="split of a saved or hub data set")
    parser.add_argument("--valid-split", help="split of the data set of --valid")
    parser.add_argument("--max-shown", type=positive, default=5, help="problems of a kind to print [%(default)s]")
    parser.add_argument("--strict", action="store_true", help="count warnings as errors in the exit status")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes [%(default)s]")
    add_reading_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
