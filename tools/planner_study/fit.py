"""Fits the efficiency of a machine to published throughput, and predicts what it was not fitted to.

    PYTHONPATH=tools python -m planner_study.fit

prints the residuals of every choice of results to fit, as docs/planner.md has them.
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
    """Tokens per second and GPU of the time model."""
    seconds = training_time(result.workload, result.layout, machine).total
    return result.workload.step_tokens / seconds / result.layout.world_size


def fit(results: Sequence[Published], machine: Machine) -> float:
    """The efficiency that minimises the squared logarithms of predicted / published.

    It scales every rate, so the prediction is proportional to it, and the best one is the geometric mean of
    published / predicted at efficiency 1.
    """
    ideal = dataclasses.replace(machine, efficiency=1.0)
    return math.exp(
        sum(math.log(result.tokens_per_second / predicted(result, ideal)) for result in results) / len(results)
    )


def residuals(results: Sequence[Published], machine: Machine) -> dict[str, float]:
    """Predicted / published - 1 of each result."""
    return {result.name: predicted(result, machine) / result.tokens_per_second - 1 for result in results}


def model_tflops(result: Published) -> float:
    """Published model FLOPs, in 10^12 per second and GPU."""
    workload = result.workload
    per_token = model_flops(workload.model, workload.segments, workload.sample_targets) / workload.sample_tokens
    return per_token * result.tokens_per_second / 1e12


def residual_table(machine: Machine) -> str:
    """Markdown: predicted / published - 1 of every result for every choice of what is fitted, which is marked *."""
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
