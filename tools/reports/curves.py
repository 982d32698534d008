"""Numbers along training: validations of all seeds of a setting, and quantities by a numeric setting."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from reports.runs import Setting


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
class Sweep:
    """Settings that differ in one numeric flag, in the order of its values; perhaps in other flags along with it."""

    flag: str
    title: str
    points: list[tuple[float, str]]
    """Values of the flag and names of settings."""
    changing: list[str]
    """Other flags that do not have one value in all of these settings."""


def sweeps(settings: Sequence[Setting]) -> dict[str, list[Sweep]]:
    """For each flag with several numeric values in run.json's `settings`: the series of settings along it.

    A series has one experiment and method and the same of all settings that are not numbers. If it then has two
    settings of one value, the other numbers must be equal, too. Series of a single value are left out.
    """
    found = {}
    for flag in sorted({flag for setting in settings for flag in setting.runs[0].settings}):
        having = [setting for setting in settings if number(setting.runs[0].settings.get(flag)) is not None]
        if len({number(setting.runs[0].settings[flag]) for setting in having}) < 2:
            continue
        series = [part for group in _groups(having, flag, numbers=False) for part in _unique(group, flag)]
        lines = [_sweep(flag, group) for group in series if len(group) > 1]
        if lines:
            found[flag] = lines
    return found


def number(value: Any) -> float | None:
    """The number that a value of run.json's `settings` is, or spells; None if it is something else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _groups(settings: Sequence[Setting], flag: str, *, numbers: bool) -> list[list[Setting]]:
    groups: dict[tuple[object, ...], list[Setting]] = defaultdict(list)
    for setting in settings:
        run = setting.runs[0]
        others = {
            name: str(value)
            for name, value in run.settings.items()
            if name != flag and (numbers or number(value) is None)
        }
        groups[run.experiment, run.method, *sorted(others.items())].append(setting)
    return list(groups.values())


def _unique(group: list[Setting], flag: str) -> list[list[Setting]]:
    """The group, or its parts where it has two settings with one value of the flag."""
    values = [number(setting.runs[0].settings[flag]) for setting in group]
    return [group] if len(set(values)) == len(values) else _groups(group, flag, numbers=True)


def _sweep(flag: str, group: list[Setting]) -> Sweep:
    run = group[0].runs[0]
    told = [setting.runs[0].settings for setting in group]
    others = sorted({name for each in told for name in each} - {flag})
    changing = [name for name in others if len({str(each.get(name)) for each in told}) > 1]
    title = ", ".join([run.method, *(f"{name} {run.settings[name]}" for name in others if name not in changing)])
    points = [(float(setting.runs[0].settings[flag]), setting.name) for setting in group]
    return Sweep(flag, title, sorted(points), changing)
