"""Choose the best value of a flag for each setting of a tuning experiment, and write the choices as YAML.

    python examples/debian_tldr/experiments/choose.py --metric validation/posterior_kl_to_policy --out tuned.yaml \\
        SETTING:lr:1e-05:run1/metrics.jsonl SETTING:lr:3e-05:run2/metrics.jsonl ...

The best value is the one with the lowest metric in the last validation of its runs, averaged over them. `--out` keeps
what it has of other settings. The file says what every value reached:

    SETTING:
      flags: {lr: 3.0e-05}
      metric: validation/posterior_kl_to_policy
      reached: {lr 1e-05: 0.61, lr 3e-05: 0.48}
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from user_errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose the best value of a flag for each setting.")
    parser.add_argument("--metric", required=True, help="key of metrics.jsonl; the lowest last value wins")
    parser.add_argument("--out", type=Path, required=True, help="YAML file to write, or to add to")
    parser.add_argument("runs", nargs="+", metavar="SETTING:FLAG:VALUE:METRICS", help="a run and its metrics.jsonl")
    args = parser.parse_args()
    chosen = yaml.safe_load(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    choices = choose([parse_run(text) for text in args.runs], args.metric)
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text(yaml.safe_dump({**chosen, **choices}), encoding="utf-8")
    partial.replace(args.out)
    for name, choice in choices.items():
        flags = ", ".join(f"{flag} {value:g}" for flag, value in choice["flags"].items())
        print(f"{name}: {flags}; {choice['metric']}: {choice['reached']}")


def parse_run(text: str) -> tuple[str, str, float, Path]:
    """Setting, flag, value and metrics file of an argument."""
    parts = text.split(":", maxsplit=3)
    if len(parts) < 4:
        raise UserError(f"{text}: expected SETTING:FLAG:VALUE:METRICS")
    return parts[0], parts[1], float(parts[2]), Path(parts[3])


def choose(runs: list[tuple[str, str, float, Path]], metric: str) -> dict[str, dict]:
    """The best value for each setting.

    Raises:
        UserError: a metrics file does not have the metric.
    """
    reached: dict[tuple[str, str], dict[float, list[float]]] = {}
    for setting, flag, value, path in runs:
        reached.setdefault((setting, flag), {}).setdefault(value, []).append(last_value(path, metric))
    choices = {}
    for (setting, flag), values in reached.items():
        means = {value: sum(found) / len(found) for value, found in values.items()}
        # A run that ended in numbers that are not finite is the worst one.
        best = min(means, key=lambda value: means[value] if math.isfinite(means[value]) else math.inf)
        shown = {f"{flag} {value:g}": round(mean, 5) for value, mean in means.items()}
        choices[setting] = {"flags": {flag: best}, "metric": metric, "reached": shown}
    return choices


def last_value(path: Path, metric: str) -> float:
    """The metric in the last line that has it."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    values = [line[metric] for line in lines if metric in line]
    if not values:
        raise UserError(f"{path}: no line has {metric}")
    return float(values[-1])


if __name__ == "__main__":
    run(main)
