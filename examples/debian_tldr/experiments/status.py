"""Tables of what an experiment has done, and how long the rest takes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from plan import Plan
from state import OVER, Condition, State
from steps import Step

SHARED = "shared"


def minutes_left(plan: Plan, state: State, conditions: Mapping[str, Condition], jobs: int) -> float:
    """Estimate of the minutes until an experiment is finished with so many jobs: machine time of the steps left."""
    pace = paces(plan, state)
    left = [step for name, step in plan.steps.items() if conditions[name] not in OVER]
    return sum(machine_minutes(step, jobs) * pace.get(step.kind, 1.0) for step in left)


def machine_minutes(step: Step, jobs: int) -> float:
    """Minutes for which a step of the plan would have the whole machine."""
    return step.minutes * min(step.slots, jobs) / jobs


def paces(plan: Plan, state: State) -> dict[str, float]:
    """How long finished steps took, relative to what was expected, by their kind."""
    taken: dict[str, float] = defaultdict(float)
    expected: dict[str, float] = defaultdict(float)
    for name in plan.steps:
        marker = state.marker(name)
        if marker is not None and marker["done"]:
            taken[marker["kind"]] += marker["seconds"] / 60
            expected[marker["kind"]] += marker["minutes"]
    return {kind: taken[kind] / expected[kind] for kind in taken}


def status_lines(plan: Plan, state: State, jobs: int, *, at_work: bool) -> list[str]:
    """A table with a row for the shared stages, for those of each seed, and for each run.

    Args:
        at_work: whether a runner is at work, so that a step that has begun is under way.
    """
    conditions = state.conditions(plan.steps)
    rows: dict[str, list[str]] = defaultdict(list)
    for name in plan.steps:
        rows[name.rsplit("/", 1)[0]].append(name)
    pace = paces(plan, state)
    width = max(len(row) for row in rows)
    lines = [f"{'':{width}}  {'state':12} {'minutes':>8} {'left':>6}  steps left"]
    for row, names in rows.items():
        left = [name for name in names if conditions[name] not in OVER]
        taken = sum(marker["seconds"] for name in names if (marker := state.marker(name)) is not None) / 60
        ahead = sum(plan.steps[name].minutes * pace.get(plan.steps[name].kind, 1.0) for name in left)
        words = _state(names, conditions, at_work)
        lines.append(f"{row:{width}}  {words:12} {taken:8.1f} {ahead:6.1f}  {', '.join(_short(name) for name in left)}")
    total = minutes_left(plan, state, conditions, jobs)
    lines.append(f"{len(plan.runs)} runs; about {total:.0f} minutes left with {jobs} jobs")
    lines.append(f"wall time of all ended sessions in {state.work}: {session_hours(state.work):.2f} hours")
    return lines


def session_hours(work: Path) -> float:
    """Hours by the clock of all sessions for a WORK that have ended, whatever came of them."""
    path = work / "log" / "sessions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return sum(json.loads(line)["seconds"] for line in lines) / 3600


def _state(names: list[str], conditions: Mapping[str, Condition], at_work: bool) -> str:
    found = {conditions[name] for name in names}
    if found == {"done"}:
        return "done"
    if "changed" in found:
        return "changed"
    if "diverged" in found and found <= {"done", "diverged"}:
        return "diverged"
    if "begun" in found:
        return "under way" if at_work else "interrupted"
    return "partly done" if "done" in found else "left"


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
