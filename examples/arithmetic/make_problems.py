"""Writes sums of two digits: demonstrations with random answers, and problems whose answer only the rule reads.

    python examples/arithmetic/make_problems.py --out DIR [--seed N]

DIR gets sft.jsonl (prompts with a random number as the completion, which teaches the form of an answer and nothing of
its value), train.jsonl and test.jsonl (prompts with the right number in the field `answer`). No problem of test.jsonl
is in train.jsonl.
"""

import argparse
import json
import random
from pathlib import Path

_LARGEST = 18
"""Largest sum of two digits."""
_HELD_OUT = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    problems = [(a, b) for a in range(10) for b in range(10)]
    draw.shuffle(problems)
    args.out.mkdir(parents=True, exist_ok=True)
    guesses = [{"prompt": _prompt(a, b), "completion": str(draw.randint(0, _LARGEST))} for a, b in problems * 20]
    draw.shuffle(guesses)
    _write(args.out / "sft.jsonl", guesses)
    asked = [{"id": f"{a}+{b}", "prompt": _prompt(a, b), "answer": a + b} for a, b in problems]
    _write(args.out / "train.jsonl", asked[_HELD_OUT:])
    _write(args.out / "test.jsonl", asked[:_HELD_OUT])


def _prompt(a: int, b: int) -> str:
    return f"{a}+{b}="


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
