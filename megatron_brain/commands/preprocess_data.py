"""Tokenize a corpus once, for any number of runs.

    python tools/preprocess_data.py --stage sft --input data.jsonl --output prepared/train --hf-model DIR --workers 8

Writes PREFIX.json and, as --format says, PREFIX.bin and PREFIX.idx (megatron-core's indexed format) or PREFIX.arrow,
and prints lengths, truncations and duplicates. A stage reads it with --train-data PREFIX. After a kill, the
same command goes on with the parts that are not finished. Exit status 2: a mistake of the user, a bad record, or a
worker process that was killed.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_brain.commands.reading_flags import add_reading_flags, reading_settings
from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.data.prepared.documents import FILES
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.prepared.statistics import statistics_table
from megatron_brain.flag_types import positive


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    args = _parse(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("megatron_brain").setLevel(logging.INFO)
    # Our worker processes share the cores better than the threads of the tokenizers library.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    job = Preparation(
        input=args.input,
        split=args.split,
        prefix=args.output,
        format=args.format,
        reading=reading_settings(args),
        workers=args.workers,
    )
    info = prepare(job)
    Console().print(statistics_table(args.output, info.counts, info.statistics))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenize a corpus once, for any number of runs.")
    parser.add_argument("--input", required=True, help="records, as a stage's --train-data")
    parser.add_argument("--split", help="split of a saved or hub data set")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the files without their endings")
    parser.add_argument("--format", choices=tuple(FILES), default="indexed", help="[%(default)s]")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes [%(default)s]")
    add_reading_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
