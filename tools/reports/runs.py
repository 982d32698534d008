"""Reads the runs of experiments, and refuses to compare what is not comparable."""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_brain.errors import ConfigError

RUN, EVALUATION, METRICS = "run.json", "evaluation.json", "metrics.jsonl"
SHARED = "shared"
"""Folder of the stages that runs share; what is below is no run."""

_OF_RUN = {
    "experiment": str,
    "setting": str,
    "label": str,
    "method": str,
    "seed": int,
    "data_hash": str,
    "commands": list,
    "started": str,
    "ended": str,
    "seconds": (int, float),
    "versions": dict,
    "settings": dict,
}
"""Keys of run.json with the types of their values."""


@dataclass(frozen=True)
class Run:
    """One seed of one setting: what the runner wrote of it, and its results."""

    folder: Path
    experiment: str
    setting: str
    label: str
    method: str
    seed: int
    data_hash: str
    commands: list[list[str]]
    started: str
    ended: str
    seconds: float
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    """One object for each held-out prompt of the report, as the evaluate stage wrote it; empty where it wrote none."""
    means: dict[str, float]
    """The means that the evaluate stage wrote."""
    lines: list[dict[str, Any]] | None
    """The lines of metrics.jsonl in the order of their iterations; None where there is no such file."""

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The rows that are not empty."""
        return [row for row in self.rows if row]


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, in the order of their seeds; they differ in the seed alone."""

    name: str
    """What tables and figures call it; no other setting of the report has this name."""
    runs: tuple[Run, ...]

    @property
    def place(self) -> str:
        """Experiment and folder, as a path."""
        return f"{self.runs[0].experiment}/{self.runs[0].setting}"

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)


def read_settings(places: Sequence[Path]) -> tuple[list[Setting], list[str]]:
    """All finished runs at or below the places, by setting.

    Returns:
        the settings, in the order of their names; and sentences on runs that are left out because they have not ended,
        and on settings with fewer prompts than others.

    Raises:
        ConfigError: a place is missing, no finished run is there, a file is not what it should be, or runs cannot be
            compared: other data, other prompts, the same seed twice, other settings in one folder.
    """
    finished, notes = [], []
    for folder in _run_folders(places):
        missing = [name for name in (RUN, EVALUATION) if not (folder / name).is_file()]
        if missing:
            why = "was not evaluated" if missing == [EVALUATION] else "has not ended"
            notes.append(f"{folder} has no {' and no '.join(missing)}: the run {why}, and is left out")
        else:
            finished.append(_read_run(folder))
    if not finished:
        told = "".join(f"\n  {sentence}" for sentence in notes)
        raise ConfigError(f"no finished run at or below {', '.join(map(str, places))}{told}")
    _require_one("hashes of the data", finished, [run.data_hash for run in finished])
    settings = _by_setting(_with_same_prompts(finished))
    every = len(settings[0].runs[0].rows)
    fewer = {setting.name: len(setting.runs[0].answered) for setting in settings}
    notes += [
        f"{name} has {count} of the {every} prompts: compare it with others by their differences, which are over the "
        "prompts that both have"
        for name, count in fewer.items()
        if count < every
    ]
    return settings, notes


def _run_folders(places: Sequence[Path]) -> list[Path]:
    """Folders with a run.json or a name like seed3, at or below the places, each once."""
    found: dict[Path, Path] = {}
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place}: no such folder; give run folders, or folders that contain them")
        for folder in _descend(place):
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _descend(folder: Path) -> Iterator[Path]:
    # What lies below a run, such as the folders of its stages, belongs to it.
    if (folder / RUN).is_file() or re.fullmatch(r"seed\d+", folder.name):
        yield folder
        return
    for below in sorted(folder.iterdir()):
        if below.is_dir() and below.name != SHARED:
            yield from _descend(below)


def _read_run(folder: Path) -> Run:
    told = _read_json(folder / RUN)
    for key, kind in _OF_RUN.items():
        if not isinstance(told.get(key), kind):
            state = "is missing" if key not in told else f"is {told[key]!r}"
            raise ConfigError(f"{folder / RUN}: {key!r} {state}; the runner of the experiments writes it")
    rows, means = _read_evaluation(folder / EVALUATION)
    lines = _read_lines(folder / METRICS) if (folder / METRICS).exists() else None
    return Run(folder=folder, rows=rows, means=means, lines=lines, **{key: told[key] for key in _OF_RUN})


def _read_evaluation(path: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    evaluation = _read_json(path)
    missing = [key for key in ("num_prompts", "metrics", "rows") if key not in evaluation]
    if missing:
        raise ConfigError(f"{path}: {', '.join(missing)} missing; is it what the evaluate stage wrote?")
    rows = evaluation["rows"]
    if len(rows) != evaluation["num_prompts"] or len(rows) < 2:
        raise ConfigError(f"{path}: has {len(rows)} rows, num_prompts is {evaluation['num_prompts']}; 2 at least")
    for number, row in enumerate(rows):
        if "prompt" not in row or "policy" not in row:
            raise ConfigError(f"{path}: row {number} has no 'prompt' or no 'policy'")
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{path}: {key} of row {number} is {value}")
    return rows, {name: metric["value"] for name, metric in evaluation["metrics"].items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = _parse(text, f"{path}, line {number}")
        if not isinstance(line.get("iteration"), int) or line["iteration"] in lines:
            raise ConfigError(f"{path}, line {number}: its iteration is missing or was there before")
        lines[line["iteration"]] = line
    return [lines[iteration] for iteration in sorted(lines)]


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(path.read_text(encoding="utf-8"), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value


def _with_same_prompts(runs: Sequence[Run]) -> list[Run]:
    """The runs with their rows in the order of the longest list of prompts.

    Raises:
        ConfigError: a run has prompts, or references, that are not in that list.
    """
    longest = max(runs, key=lambda run: len(run.rows))
    places = {_identity(row): place for place, row in enumerate(longest.rows)}
    if len(places) < len(longest.rows):
        raise ConfigError(f"{longest.folder / EVALUATION}: has a prompt with the same reference twice")
    ordered = []
    for run in runs:
        rows: list[dict[str, Any]] = [{} for _ in longest.rows]
        for row in run.rows:
            if _identity(row) not in places:
                raise ConfigError(
                    f"{run.folder} has another prompt or reference than {longest.folder}, so they cannot be compared: "
                    f"{row['prompt'][:60]!r}"
                )
            rows[places[_identity(row)]] = row
        ordered.append(dataclasses.replace(run, rows=rows))
    return ordered


def _identity(row: dict[str, Any]) -> tuple[str, str | None]:
    return row["prompt"], row.get("reference")


def _require_one(what: str, runs: Sequence[Run], values: Sequence[Hashable]) -> None:
    by_value: dict[Hashable, list[str]] = defaultdict(list)
    for run, value in zip(runs, values, strict=True):
        by_value[value].append(str(run.folder))
    if len(by_value) > 1:
        groups = "".join(f"\n  {value}: {', '.join(folders)}" for value, folders in by_value.items())
        raise ConfigError(f"the runs have different {what}, so they cannot be compared; make a report of each:{groups}")


def _by_setting(runs: Sequence[Run]) -> list[Setting]:
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (_natural(run.experiment), _natural(run.setting), run.seed)):
        groups[run.experiment, run.setting].append(run)
    for (experiment, setting), members in groups.items():
        where = f"{experiment}/{setting}"
        _require_one(f"labels in {where}", members, [run.label for run in members])
        answered = [tuple(bool(row) for row in run.rows) for run in members]
        _require_one(f"numbers of prompts in {where}", members, [sum(places) for places in answered])
        _require_one(f"choices of prompts in {where}", members, [hash(places) for places in answered])
        _require_one(f"methods in {where}", members, [run.method for run in members])
        _require_one(f"settings in {where}", members, [json.dumps(run.settings, sort_keys=True) for run in members])
        by_seed: dict[int, list[str]] = defaultdict(list)
        for run in members:
            by_seed[run.seed].append(str(run.folder))
        for seed, folders in by_seed.items():
            if len(folders) > 1:
                raise ConfigError(f"{where} has seed {seed} more than once: {', '.join(folders)}; give one of them")
    labels = [members[0].label for members in groups.values()]
    settings = []
    for (experiment, setting), members in groups.items():
        label = members[0].label
        name = label if labels.count(label) == 1 else f"{label} ({experiment}/{setting})"
        settings.append(Setting(name=name, runs=tuple(members)))
    return settings


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that puts n8 before n16."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
