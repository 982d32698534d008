"""Choose the best value of a flag for each setting of a tuning experiment, and write the choices as YAML.

    python examples/debian_tldr/experiments/choose.py --temperature 0.2 --out tuned.yaml \\
        SETTING:distance:lr:1e-05:32:run1/metrics.jsonl SETTING:distance:lr:3e-05:32:run2/metrics.jsonl ...

What is compared is the validation after the last iteration (32 here), by the mean of a setting's runs of one value:

- `distance`: KL(posterior || policy), `validation/posterior_kl_to_policy`; the lowest wins.
- `objective`: `validation/reward_mean - T validation/kl_to_prior` with T of `--temperature`; the highest wins.

A run without a validation after its last iteration has diverged, and no other value is worse. `--out` keeps what it
has of other settings. The file says what every value reached, where the runs started, and what speaks against the
choice:

    SETTING:
      flags: {lr: 3.0e-05}
      chosen_by: distance
      start: 1.62
      reached: {lr 1e-05: 1.49, lr 3e-05: 1.36, lr 0.0001: diverged}
      warnings: []

If all values of a setting diverged, its `flags` are empty, and experiments that need them say so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from user_errors import UserError, run

from megatron_brain.files import write_whole

DISTANCE, OBJECTIVE = "distance", "objective"
CRITERIA = (DISTANCE, OBJECTIVE)
KEYS = {
    DISTANCE: ("validation/posterior_kl_to_policy",),
    OBJECTIVE: ("validation/reward_mean", "validation/kl_to_prior"),
}


@dataclass(frozen=True)
class Candidate:
    """A run with one value of a setting's flag."""

    setting: str
    criterion: str
    flag: str
    value: float
    iterations: int
    """Its last iteration."""
    metrics: Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose the best value of a flag for each setting.")
    parser.add_argument("--temperature", type=float, required=True, help="weight of the KL divergence in `objective`")
    parser.add_argument("--out", type=Path, required=True, help="YAML file to write, or to add to")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="SETTING:CRITERION:FLAG:VALUE:ITERATIONS:METRICS",
        help="a run: its criterion is distance or objective, METRICS is its metrics.jsonl",
    )
    args = parser.parse_args()
    chosen = yaml.safe_load(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    choices = choose([parse_run(text) for text in args.runs], args.temperature)
    write_whole(args.out, yaml.safe_dump({**chosen, **choices}))
    for name, choice in choices.items():
        flags = ", ".join(f"{flag} {value:g}" for flag, value in choice["flags"].items()) or "no value"
        print(f"{name}: {flags}; {choice['chosen_by']} at the start {choice['start']}, at the end {choice['reached']}")
        for warning in choice["warnings"]:
            print(f"WARNING: {name}: {warning}")


def parse_run(text: str) -> Candidate:
    """The run of an argument."""
    parts = text.split(":", maxsplit=5)
    if len(parts) < 6 or parts[1] not in CRITERIA:
        raise UserError(f"{text}: expected SETTING:CRITERION:FLAG:VALUE:ITERATIONS:METRICS, CRITERION of {CRITERIA}")
    return Candidate(parts[0], parts[1], parts[2], float(parts[3]), int(parts[4]), Path(parts[5]))


def choose(runs: list[Candidate], temperature: float) -> dict[str, dict]:
    """The best value for each setting.

    Raises:
        UserError: no run of a setting has a validation before its first step.
    """
    choices = {}
    for setting in dict.fromkeys(each.setting for each in runs):
        own = [each for each in runs if each.setting == setting]
        criterion, flag = own[0].criterion, own[0].flag
        values: dict[float, list[float]] = {}
        for each in own:
            reached = value_at(each, each.iterations, temperature)
            values.setdefault(each.value, []).append(math.nan if reached is None else reached)
        starts = [start for each in own if (start := value_at(each, 0, temperature)) is not None]
        if not starts:
            raise UserError(f"{own[0].metrics}: no line of iteration 0 has {' and '.join(KEYS[criterion])}")
        means = {value: sum(found) / len(found) for value, found in sorted(values.items())}
        choices[setting] = _choice(criterion, flag, means, sum(starts) / len(starts))
    return choices


def _choice(criterion: str, flag: str, means: Mapping[float, float], start: float) -> dict[str, Any]:
    """What tuned.yaml says of a setting; values in `means` that diverged have NaN."""
    sign = 1 if criterion == DISTANCE else -1
    costs = {value: math.inf if math.isnan(mean) else sign * mean for value, mean in means.items()}
    best = min(costs, key=costs.__getitem__)
    warnings = []
    if math.isinf(costs[best]):
        warnings.append(f"all values of {flag} diverged; try lower ones")
    else:
        if len(costs) > 1 and best in (min(costs), max(costs)):
            edge = "lowest" if best == min(costs) else "highest"
            warnings.append(f"{flag} {best:g} is the {edge} value of the grid; one beyond it may be better")
        if costs[best] >= sign * start:
            warnings.append(f"no value of {flag} ends better than the start; none of them is of use")
    return {
        "flags": {} if math.isinf(costs[best]) else {flag: best},
        "chosen_by": criterion,
        "start": round(start, 5),
        "reached": {
            f"{flag} {value:g}": "diverged" if math.isnan(mean) else round(mean, 5) for value, mean in means.items()
        },
        "warnings": warnings,
    }


def value_at(run: Candidate, iteration: int, temperature: float) -> float | None:
    """The criterion of the validation after an iteration; None where there was none."""
    keys, found = KEYS[run.criterion], None
    text = run.metrics.read_text(encoding="utf-8") if run.metrics.exists() else ""
    for line in map(json.loads, text.splitlines()):
        if line["iteration"] == iteration and all(key in line for key in keys):
            first, *penalty = (float(line[key]) for key in keys)
            found = first - temperature * sum(penalty)
    return found


if __name__ == "__main__":
    run(main)
