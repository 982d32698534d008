"""Split a jsonl file into parts that follow one another, none of which shares a record with another.

    python examples/debian_tldr/split_data.py --data data/train.jsonl --out parts sft=720 pair_prompts=160

writes the first 720 lines to `parts/sft.jsonl` and the next 160 to `parts/pair_prompts.jsonl`.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from user_errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description="Split a jsonl file into parts that follow one another.")
    parser.add_argument("--data", type=Path, required=True, help="jsonl file to split")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("parts", nargs="+", metavar="NAME=COUNT", help="a part and its number of lines")
    args = parser.parse_args()
    parts = [parse_part(text) for text in args.parts]
    args.out.mkdir(parents=True, exist_ok=True)
    with args.data.open(encoding="utf-8") as lines:
        for name, count in parts:
            taken = list(islice(lines, count))
            if len(taken) < count:
                raise UserError(
                    f"{args.data}: too short for {' '.join(args.parts)}: {name} would have {len(taken)} lines"
                )
            (args.out / f"{name}.jsonl").write_text("".join(taken), encoding="utf-8")


def parse_part(text: str) -> tuple[str, int]:
    """Name and count of an argument such as `sft=720`."""
    name, _, count = text.partition("=")
    if not name or not count.isdecimal() or int(count) < 1:
        raise UserError(f"{text}: expected NAME=COUNT with a positive number")
    return name, int(count)


if __name__ == "__main__":
    run(main)
