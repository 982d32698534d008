"""Evaluate best-of-n of the SFT model: of n samples to each held-out prompt, the one with the largest reward.

    python examples/debian_tldr/best_of_n.py --posterior-data posterior.jsonl --evaluation prior.json --n 16 \\
        --judge score --output evaluation.json

It needs no model: the samples with their rewards are those that `evaluate --posterior-samples N --posterior-data FILE`
wrote, drawn from the SFT model at temperature 1. The first n of each prompt count. References, and the SFT model's own
answers, come from the report of the same `evaluate`. The result has the form of such a report, over the prompts that
have samples. It has no scores of the SFT model's answers, and so no win-rates against them: these were sampled at
another temperature. `kl_to_prior_at_most` is `log n - (n - 1)/n`, which the KL divergence of best-of-n from the SFT
model does not exceed (Beirami et al. 2024, arXiv 2401.01879).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import judge
from user_errors import UserError, run

from megatron_brain.stages.evaluate.stage import summarize, write_report

OF_BASELINE = ("id", "prompt", "reference", "baseline", "length/baseline", "unfinished/baseline")
SCORES_KEPT = ("reward/reference", "judge/reference")

Judge = Callable[[list[str], list[str], list[str]], list[float]]


def main() -> None:
    args = parse_args()
    evaluation = json.loads(args.evaluation.read_text(encoding="utf-8"))
    samples = [json.loads(line) for line in args.posterior_data.read_text(encoding="utf-8").splitlines()]
    rows = best_rows(samples, {row["id"]: row for row in evaluation["rows"]}, args.n)
    add_judge(rows, getattr(judge, args.judge))
    metrics = summarize(rows, bootstrap_samples=args.bootstrap_samples, seed=args.seed)
    write_report(args.output, rows, metrics, num_examples=3)
    for name, estimate in metrics.items():
        print(f"{name:40} {estimate.value:8.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate best-of-n of the SFT model from scored samples.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--posterior-data", type=Path, required=True, help="scored samples of the SFT model")
    parser.add_argument("--evaluation", type=Path, required=True, help="report of the SFT model on the same prompts")
    parser.add_argument("--n", type=int, required=True, help="samples of which the best one counts")
    parser.add_argument("--judge", choices=("score", "score_rouge"), default="score", help="function of judge.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON report to write")
    parser.add_argument("--bootstrap-samples", type=int, default=2000, help="resamplings of the prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamplings")
    args = parser.parse_args()
    if args.n < 1:
        parser.error("--n must be at least 1")
    return args


def best_rows(samples: list[dict], evaluated: dict[str, dict], count: int) -> list[dict]:
    """A row for each prompt that has samples, with the best of its first `count` ones as the policy's answer.

    Args:
        samples: lines of the samples' file.
        evaluated: the rows of the SFT model's evaluation by id.

    Raises:
        UserError: a prompt has too few samples, or was not evaluated.
    """
    rows = []
    for prompt in samples:
        if len(prompt["responses"]) < count:
            raise UserError(f"{prompt['id']} has {len(prompt['responses'])} samples: --n {count} needs as many")
        if prompt["id"] not in evaluated:
            raise UserError(f"{prompt['id']} has samples, but is not in --evaluation: give that of the same prompts")
        known = evaluated[prompt["id"]]
        best = max(prompt["responses"][:count], key=lambda response: response["reward"])
        rows.append(
            {name: known[name] for name in OF_BASELINE}
            | {
                "policy": best["text"],
                "length/policy": len(best["tokens"]),
                "unfinished/policy": float(not best["finished"]),
                "kl_to_prior_at_most": math.log(count) - (count - 1) / count,
                "reward/policy": best["reward"],
                "reward/plain": best["reward"],
            }
            | {name: known[name] for name in SCORES_KEPT if name in known}
        )
    return rows


def add_judge(rows: list[dict], score: Judge) -> None:
    """Add the judge's scores of the answers to the rows."""
    columns = ([row[name] for row in rows] for name in ("prompt", "policy", "reference"))
    for row, value in zip(rows, score(*columns), strict=True):
        row["judge/policy"] = value


if __name__ == "__main__":
    run(main)
