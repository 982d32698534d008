"""Numbers along training: validations of all seeds of a setting, and quantities by a numeric setting."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from reports.runs import Setting

DISTANCES = ("validation/posterior_kl_to_policy", "validation/posterior_kl_alpha_beta")


@dataclass(frozen=True)
class Curve:
    """Metrics of all seeds of a setting at the iterations that all seeds have."""

    name: str
    iterations: numpy.ndarray
    """int `[T]`"""
    values: dict[str, numpy.ndarray]
    """float `[S, T]` by the metric"""


def training_curves(settings: Sequence[Setting], keys: Sequence[str]) -> tuple[list[Curve], list[str]]:
    """The metrics `keys` of metrics.jsonl along training.

    Returns:
        a curve for each setting whose seeds all have these metrics; and a sentence for each setting, or part of a
        training, that is left out.
    """
    curves, notes = [], []
    for setting in settings:
        without = [str(run.seed) for run in setting.runs if run.lines is None]
        if without:
            of_seeds = f"no metrics.jsonl of seed {', '.join(without)}"
            notes.append(f"{setting.name} is not in the figures along training: {of_seeds}")
            continue
        found = [
            {line["iteration"]: line for line in run.lines or () if all(key in line for key in keys)}
            for run in setting.runs
        ]
        common = sorted(set.intersection(*(set(lines) for lines in found)))
        if not common:
            notes.append(f"{setting.name} has no iteration where all seeds have {' and '.join(keys)}")
            continue
        dropped = sorted(set.union(*(set(lines) for lines in found)) - set(common))
        if dropped:
            notes.append(f"{setting.name}: not all seeds have {keys[0]} at {', '.join(map(str, dropped))}; left out")
        values = {key: numpy.array([[lines[at][key] for at in common] for lines in found], dtype=float) for key in keys}
        curves.append(Curve(setting.name, numpy.array(common), values))
    return curves, notes


@dataclass(frozen=True)
class Ending:
    """The distance to the posterior at the first and at the last two validations, means of the seeds."""

    name: str
    iterations: tuple[int, int, int]
    values: tuple[float, float, float]
    falling: int
    """Seeds whose distance fell between the last two."""
    seeds: int


def endings(settings: Sequence[Setting]) -> list[Ending]:
    """How the trainings ended, of the settings whose seeds have three validations with a distance."""
    curves, _ = training_curves(settings, DISTANCES[:1])
    found = []
    for curve in curves:
        if len(curve.iterations) >= 3:
            first, last_but_one, last = curve.values[DISTANCES[0]][:, [0, -2, -1]].T
            at = curve.iterations[[0, -2, -1]].tolist()
            means = (float(first.mean()), float(last_but_one.mean()), float(last.mean()))
            found.append(Ending(curve.name, (at[0], at[1], at[2]), means, int((last < last_but_one).sum()), len(last)))
    return found


@dataclass(frozen=True)
class Sweep:
    """Settings of an experiment whose names differ in one number, which is the value of a flag."""

    flag: str
    title: str
    points: list[tuple[float, str]]
    """Values of the flag, in their order, and names of settings."""
    changing: list[str]
    """Other flags that do not have one value in all of these settings."""


def sweeps(settings: Sequence[Setting]) -> dict[str, list[Sweep]]:
    """By each flag, the series of settings along it, such as `n2`, `n8` and `n16` along samples_per_prompt.

    The flag is one of run.json's `settings` whose value is the number in the name. A setting without the flag, because
    it has the flag's usual value, belongs to the series, too.
    """
    groups: dict[tuple[str, str], list[tuple[float, Setting]]] = defaultdict(list)
    for setting in settings:
        folder = setting.runs[0].setting
        for found in re.finditer(r"\d+(\.\d+)?", folder):
            series = f"{folder[: found.start()]}#{folder[found.end() :]}"
            groups[setting.runs[0].experiment, series].append((float(found[0]), setting))
    by_flag: dict[str, list[Sweep]] = defaultdict(list)
    for members in groups.values():
        members.sort(key=lambda member: member[0])
        for flag in _flags_of(members) if len(members) > 1 else ():
            by_flag[flag].append(_sweep(flag, members))
    return dict(by_flag)


def _flags_of(members: Sequence[tuple[float, Setting]]) -> list[str]:
    """Flags that have the number of the name in every setting that has them, and in more than one."""
    values = [(value, setting.runs[0].settings) for value, setting in members]
    flags = sorted({flag for _, told in values for flag in told})
    having = {flag: [(value, number(told[flag])) for value, told in values if flag in told] for flag in flags}
    return [flag for flag, pairs in having.items() if len(pairs) > 1 and all(value == given for value, given in pairs)]


def number(value: Any) -> float | None:
    """The number that a value of run.json's `settings` is, or spells; None if it is something else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _sweep(flag: str, members: Sequence[tuple[float, Setting]]) -> Sweep:
    told = [setting.runs[0].settings for _, setting in members]
    others = sorted({name for each in told for name in each} - {flag})
    changing = [name for name in others if len({str(each[name]) for each in told if name in each}) > 1]
    value, first = members[0]
    title = re.sub(rf"(?<![\d.]){value:g}(?![\d.])", "…", first.name)
    return Sweep(flag, title, [(value, setting.name) for value, setting in members], changing)
