"""Fits the efficiency of a machine to some published results, and predicts the others.

    PYTHONPATH=tools python -m planner_study.fit

prints the residuals for every choice of fitted results, as in docs/planner.md.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from megatron_brain.planning.machine import MACHINES, Machine
from megatron_brain.planning.sizes import model_flops
from megatron_brain.planning.time import training_time
from planner_study.published import FITTED, PUBLISHED, Published


def predicted(result: Published, machine: Machine) -> float:
    """Tokens per second and GPU that the time model predicts."""
    seconds = training_time(result.workload, result.layout, machine).total
    return result.workload.step_tokens / seconds / result.layout.world_size


def fit(results: Sequence[Published], machine: Machine) -> float:
    """The efficiency that minimises the sum of squared logarithms of predicted / published.

    It scales every rate, so predictions are proportional to it, and the best efficiency is the geometric mean of
    published / predicted at efficiency 1.
    """
    ideal = dataclasses.replace(machine, efficiency=1.0)
    return math.exp(
        sum(math.log(result.tokens_per_second / predicted(result, ideal)) for result in results) / len(results)
    )


def residuals(results: Sequence[Published], machine: Machine) -> dict[str, float]:
    """Predicted / published - 1 for each result."""
    return {result.name: predicted(result, machine) / result.tokens_per_second - 1 for result in results}


def model_tflops(result: Published) -> float:
    """Published model FLOPs, in 10^12 per second and GPU."""
    workload = result.workload
    per_token = model_flops(workload.model, workload.segments, workload.sample_targets) / workload.sample_tokens
    return per_token * result.tokens_per_second / 1e12


def residual_table(machine: Machine) -> str:
    """A Markdown table of predicted / published - 1 for every result and every choice of fitted ones, marked *."""
    results = tuple(PUBLISHED.values())
    lines = [f"| efficiency | {' | '.join(result.name for result in results)} |", "|---" * (1 + len(results)) + "|"]
    for count in range(1, len(results) + 1):
        for chosen in itertools.combinations(results, count):
            efficiency, names = fit(chosen, machine), {result.name for result in chosen}
            errors = residuals(results, dataclasses.replace(machine, efficiency=efficiency))
            shown = (f"{error:+.1%}{'*' if name in names else ''}" for name, error in errors.items())
            mark = " (in machine.py)" if names == set(FITTED) else ""
            lines.append(f"| {efficiency:.4f}{mark} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(residual_table(MACHINES["h100"]))
