"""Fetch Debian's (or Ubuntu's) package descriptions and write them as summarisation pairs.

    python examples/debian_tldr/fetch_data.py --out DIR

writes `train.jsonl`, `valid.jsonl` and `test.jsonl`, one pair in each line,

    {"id": "<package>", "prompt": "<long description>\\nTL;DR:", "completion": " <synopsis>"}

and, last, `manifest.json`: how many packages each rule dropped, how many pairs each split has and the SHA-256 of each
file. A folder whose manifest matches its files and the arguments is used as it is.

The lists come from the machine's apt sources into a private folder: this needs no root rights and does not change apt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from descriptions import (
    SPLITS,
    FilterSettings,
    Package,
    filter_packages,
    parse_packages,
    split_packages,
)
from user_errors import UserError, run

PROMPT_SUFFIX = "\nTL;DR:"
MANIFEST = "manifest.json"
APT_HELPER = Path("/usr/lib/apt/apt-helper")
APT_CONFIGURATION = """\
Dir::State "{folder}/state";
Dir::State::lists "{folder}/state/lists";
Dir::Cache "{folder}/cache";
#clear Acquire::Languages;
Acquire::Languages {{ "en"; }};
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::CNF;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
"""Fetch English translations, skip what only interfaces of package managers need, and run no hooks of the machine."""


def main() -> None:
    args = parse_args()
    settings = FilterSettings(max_description_words=args.max_prompt_words)
    arguments = {
        "max_prompt_words": args.max_prompt_words,
        "valid_share": args.valid_share,
        "test_share": args.test_share,
        "seed": args.seed,
    }
    if is_complete(args.out, arguments):
        print(f"{args.out}: complete, used as it is")
        return
    lists = fetch_lists()
    packages, left_out = parse_packages(lists["Packages"], lists["Translations"])
    kept, dropped, changed = filter_packages(packages, settings)
    splits, leaked = split_packages(kept, args.valid_share, args.test_share, args.seed)
    counts = {
        "listed": len(packages) + left_out.total(),
        "dropped": dict((left_out + dropped + leaked).most_common()),
        "changed": dict(changed.most_common()),
        "kept": {name: len(splits[name]) for name in SPLITS},
    }
    write_folder(args.out, splits, arguments, counts)
    print(describe(counts))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fetch package descriptions and write summarisation pairs as jsonl files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--max-prompt-words",
        type=int,
        default=160,
        help="cut longer descriptions at a paragraph edge; a description whose first paragraph is longer is dropped",
    )
    parser.add_argument("--valid-share", type=float, default=0.05, help="share of source packages in valid.jsonl")
    parser.add_argument("--test-share", type=float, default=0.05, help="share of source packages in test.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    args = parser.parse_args()
    if args.max_prompt_words < FilterSettings.min_description_words:
        parser.error(f"--max-prompt-words must be at least {FilterSettings.min_description_words}")
    if min(args.valid_share, args.test_share) <= 0 or args.valid_share + args.test_share >= 1:
        parser.error("--valid-share and --test-share must be positive and leave something for train")
    return args


def fetch_lists() -> dict[str, list[str]]:
    """Run `apt-get update` in a private folder.

    Returns: the texts of the lists, by kind: `Packages` and `Translations`.

    Raises:
        UserError: the machine has no apt, or apt brought no list.
    """
    if shutil.which("apt-get") is None or not APT_HELPER.exists():
        raise UserError(
            "this example reads the package lists of Debian or Ubuntu and found no apt-get here; run it on such a "
            "machine or container and copy the folder, or point the stages at another data set of prompts and "
            "completions (such as trl-lib/tldr)"
        )
    with tempfile.TemporaryDirectory(prefix="apt-") as folder:
        os.chmod(folder, 0o755)  # apt gives up root rights for the download, and must still reach the folder.
        for name in ("state/lists/partial", "cache/archives/partial"):
            Path(folder, name).mkdir(parents=True)
        configuration = Path(folder, "apt.conf")
        configuration.write_text(APT_CONFIGURATION.format(folder=folder))
        update = run_apt(["apt-get", "-c", str(configuration), "update"])
        targets = run_apt(
            ["apt-get", "-c", str(configuration), "indextargets", "--format", "$(CREATED_BY)|$(FILENAME)"]
        )
        lists: dict[str, list[str]] = {"Packages": [], "Translations": []}
        for line in targets.stdout.splitlines():
            kind, _, path = line.partition("|")
            if kind in lists and Path(path).exists():
                lists[kind].append(run_apt([str(APT_HELPER), "cat-file", path]).stdout)
    messages = update.stderr.strip()
    for kind, texts in lists.items():
        if not texts:
            raise UserError(
                f"apt brought no {kind} list; check the network and the machine's apt sources (`apt-get update` "
                f"should work), then run again. apt said:\n{messages}"
            )
    if messages:
        print(f"apt said:\n{messages}", file=sys.stderr)
    return lists


def run_apt(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one of apt's programs with English messages. The caller checks the result."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)


def to_record(package: Package) -> dict[str, str]:
    return {
        "id": package.name,
        "prompt": package.description + PROMPT_SUFFIX,
        "completion": " " + package.synopsis,
    }


def write_folder(folder: Path, splits: dict[str, list[Package]], arguments: dict, counts: dict) -> None:
    """Write the splits and then the manifest, which marks the folder complete.

    Raises:
        UserError: a split is empty. Then nothing is written.
    """
    empty = [name for name in SPLITS if not splits[name]]
    if empty:
        raise UserError(
            f"no pair left for {', '.join(empty)} ({counts}); loosen --max-prompt-words or the split shares, or check "
            "that the machine's apt sources name a whole archive"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        lines = [json.dumps(to_record(package), ensure_ascii=False) + "\n" for package in splits[name]]
        split_file(folder, name).write_text("".join(lines), encoding="utf-8")
    manifest = {"arguments": arguments, "counts": counts, "sha256": file_hashes(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def split_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.jsonl"


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each split's file, by file name."""
    paths = (split_file(folder, split) for split in SPLITS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def is_complete(folder: Path, arguments: dict) -> bool:
    """Whether the folder holds the result of an earlier run with the same arguments.

    Raises:
        UserError: the folder holds the result of other arguments, or files that have changed since.
    """
    if not (folder / MANIFEST).exists():
        return False
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    cure = "give another --out, or remove the folder to fetch again"
    if manifest["arguments"] != arguments:
        raise UserError(f"{folder} was made with {manifest['arguments']}, asked for now {arguments}: {cure}")
    if manifest["sha256"] != file_hashes(folder):
        raise UserError(f"the files of {folder} differ from its {MANIFEST}: {cure}")
    return True


def describe(counts: dict) -> str:
    """The counts as lines of text."""
    lines = [f"{counts['listed']:>8,} descriptions listed"]
    lines += [f"{-count:>8,} {rule}" for rule, count in counts["dropped"].items()]
    lines += [f"{count:>8,} {split}.jsonl" for split, count in counts["kept"].items()]
    lines += [f"{count:>8,} of them: {change}" for change, count in counts["changed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
