"""Build preference pairs for the reward model from the SFT pairs and, optionally, from sampled responses.

    python examples/debian_tldr/make_preferences.py --sft data/train.jsonl --samples samples.jsonl --out preferences

writes `train.jsonl` and `valid.jsonl`, shuffled, one pair in each line:

    {"prompt": ..., "chosen": ..., "rejected": ..., "kind": ...}

These kinds need no model. Chosen is the maintainer's synopsis, and rejected is

    nearest      the synopsis of the nearest other package by TF-IDF: fluent, on topic, wrong
    first-words  the description's first words, as many as the synopsis has
    cut          the synopsis without its last words
    shuffled     the synopsis with its words in another order

Each package gives one `nearest` pair and one of the other three, drawn at random. One kind needs a model:

    samples      the best and the worst of the responses sampled for one prompt, by the judge; left out where the two
                 scores are closer than --margin

A hash of the prompt decides the file of all pairs of a prompt, so no prompt of `valid.jsonl` is in `train.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from user_errors import UserError, run

PROMPT_SUFFIX = "\nTL;DR:"
DEGRADED_KINDS = ("first-words", "cut", "shuffled")
NEIGHBOURS = 10
"""Number of nearest packages among which a synopsis that says something else is searched."""
MAX_SHARED_WORDS = 0.5
"""A neighbour's synopsis is not clearly wrong if it shares more than this share of its words with the right one."""

Judge = Callable[[list[str], list[str], list[str]], list[float]]


def main() -> None:
    args = parse_args()
    rng = random.Random(args.seed)
    left_out: Counter = Counter()
    records = read_jsonl(args.sft, {"prompt": str, "completion": str})
    pairs = reference_pairs(records, args.packages, rng, left_out)
    if args.samples:
        samples = read_jsonl(args.samples, {"prompt": str, "reference": str, "responses": list})
        pairs += sample_pairs(samples, load_judge(args.judge), args.margin, left_out)
    train, valid = split_pairs(pairs, args.valid_share, rng)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", train), ("valid", valid)):
        if not split:
            raise UserError(f"no pair left for {name}.jsonl; give more data or another --valid-share")
        write_jsonl(args.out / f"{name}.jsonl", split)
        kinds = Counter(pair["kind"] for pair in split)
        print(f"{name}.jsonl: {len(split)} pairs: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())))
    for reason, count in sorted(left_out.items()):
        print(f"left out: {count} {reason}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build preference pairs from SFT pairs and sampled responses.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sft", type=Path, required=True, help="jsonl file of prompt and completion")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--packages", type=int, help="pair only this many packages of --sft, drawn at random")
    parser.add_argument("--samples", type=Path, help="jsonl file of prompt, reference and responses (a list)")
    parser.add_argument(
        "--judge",
        choices=("score", "score_rouge"),
        default="score",
        help="function of judge.py that ranks the samples; score needs fetch_judge.py first",
    )
    parser.add_argument("--margin", type=float, default=0.1, help="least difference of judge scores in a pair")
    parser.add_argument("--valid-share", type=float, default=0.1, help="share of prompts in valid.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw")
    args = parser.parse_args()
    if not 0 < args.valid_share < 1:
        parser.error("--valid-share must lie between 0 and 1")
    if args.packages is not None and args.packages < 1:
        parser.error("--packages must be positive")
    return args


def load_judge(name: str) -> Judge:
    """Import the judge. This happens only where samples need it, because the judge imports torch."""
    import judge

    return getattr(judge, name)


def read_jsonl(path: Path, fields: dict[str, type]) -> list[dict]:
    """Read a file of JSON objects that have at least `fields`, given by name and type. No field may be empty.

    Raises:
        UserError: a line is not such an object, or there are no lines.
    """
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            for field, kind in fields.items():
                if not isinstance(record, dict) or not isinstance(record.get(field), kind) or not record[field]:
                    raise UserError(f"{path}, line {number}: needs a key {field!r}, a {kind.__name__} and not empty")
            records.append(record)
    if not records:
        raise UserError(f"{path} is empty")
    return records


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def make_pair(prompt: str, chosen: str, rejected: str, kind: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": kind}


def reference_pairs(records: list[dict], packages: int | None, rng: random.Random, left_out: Counter) -> list[dict]:
    """Pair each record's completion with its nearest neighbour's and with one degraded text.

    Args:
        records: SFT records. All of them can be neighbours.
        packages: how many records to pair, drawn at random; None: all.
        left_out: counts why records have fewer than two pairs, by reason.
    """
    chosen_rows = list(range(len(records)))
    if packages is not None:
        if packages > len(records):
            raise UserError(f"--packages {packages}: the SFT file has only {len(records)} records")
        chosen_rows = sorted(rng.sample(chosen_rows, packages))
    pairs = []
    for row, neighbours in zip(chosen_rows, nearest_records(records, chosen_rows), strict=True):
        prompt, chosen = records[row]["prompt"], records[row]["completion"]
        kind = rng.choice(DEGRADED_KINDS)
        rejected = {
            "nearest": neighbour_completion(chosen, [records[index]["completion"] for index in neighbours]),
            kind: degraded_completion(kind, prompt, chosen, rng),
        }
        for name, text in rejected.items():
            if text is None:
                left_out[f"{name}: no rejected text that clearly differs from the chosen"] += 1
            else:
                pairs.append(make_pair(prompt, chosen, text, name))
    return pairs


def nearest_records(records: list[dict], rows: list[int], batch: int = 256) -> list[list[int]]:
    """Indices of the `NEIGHBOURS` records nearest to each of `rows` by TF-IDF of the prompts, nearest first."""
    vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True, dtype=np.float32)
    vectors = vectorizer.fit_transform(record["prompt"].removesuffix(PROMPT_SUFFIX) for record in records)
    nearest = []
    for start in range(0, len(rows), batch):
        own = rows[start : start + batch]
        similarity = (vectors[own] @ vectors.T).toarray()
        similarity[np.arange(len(own)), own] = -1.0
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(records) - 1)]
        nearest += order.tolist()
    return nearest


def neighbour_completion(chosen: str, candidates: list[str]) -> str | None:
    """The first candidate that shares at most `MAX_SHARED_WORDS` of its words with the chosen text, or None."""
    words = set(chosen.lower().split())
    for candidate in candidates:
        own = set(candidate.lower().split())
        if len(own & words) <= MAX_SHARED_WORDS * len(own):
            return candidate
    return None


def degraded_completion(kind: str, prompt: str, chosen: str, rng: random.Random) -> str | None:
    """Make the rejected text of one of `DEGRADED_KINDS`; None where it would be the same as the chosen one."""
    words = chosen.split()
    if kind == "first-words":
        degraded = prompt.removesuffix(PROMPT_SUFFIX).split()[: len(words)]
    elif kind == "cut":
        degraded = words[: rng.randint(1, max(1, len(words) - 1))]
    else:
        degraded = rng.sample(words, len(words))
    if [word.lower() for word in degraded] == [word.lower() for word in words]:
        return None
    return " " + " ".join(degraded)


def sample_pairs(samples: list[dict], judge: Judge, margin: float, left_out: Counter) -> list[dict]:
    """Pair the responses of each prompt that the judge finds best and worst.

    Args:
        margin: pairs whose scores are closer are left out and counted in `left_out`. So are empty responses, which no
            pair may have.
    """
    rows = []
    for index, sample in enumerate(samples):
        full = [response for response in sample["responses"] if response.strip()]
        left_out["samples: empty response"] += len(sample["responses"]) - len(full)
        rows += [(index, response) for response in full]
    scores = judge(
        [samples[index]["prompt"] for index, _ in rows],
        [response for _, response in rows],
        [samples[index]["reference"] for index, _ in rows],
    )
    judged: list[list[tuple[float, str]]] = [[] for _ in samples]
    for (index, response), value in zip(rows, scores, strict=True):
        judged[index].append((value, response))
    pairs = []
    for sample, responses in zip(samples, judged, strict=True):
        if len(responses) < 2:
            left_out["samples: prompt with fewer than two responses"] += 1
            continue
        (worst, rejected), (best, chosen) = min(responses), max(responses)
        if best - worst < margin:
            left_out[f"samples: scores closer than {margin}"] += 1
        else:
            pairs.append(make_pair(sample["prompt"], chosen, rejected, "samples"))
    return pairs


def split_pairs(pairs: list[dict], valid_share: float, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Split into train and valid by a hash of the prompt, and shuffle each."""
    train, valid = [], []
    for pair in pairs:
        digest = hashlib.sha256(pair["prompt"].encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < valid_share * 2**64
        (valid if held_out else train).append(pair)
    rng.shuffle(train)
    rng.shuffle(valid)
    return train, valid


if __name__ == "__main__":
    run(main)
