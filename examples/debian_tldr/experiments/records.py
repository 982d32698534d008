"""`run.json` of a finished run, beside its `metrics.jsonl` and `evaluation.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import Any

from plan import Plan, Run, closure
from state import State, write_json
from versions import joined

DATA_STEP = "shared/data"


def is_recorded(run: Run, state: State) -> bool:
    """Whether `run.json` is that of the setting and the steps as they are now."""
    path = run.folder / "run.json"
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    expected = {**described(run), "results": results(run, state)}
    return all(record.get(name) == value for name, value in expected.items())


def write_record(plan: Plan, run: Run, state: State) -> None:
    """Copy the results of a run into its folder, and write `run.json` last.

    `versions` are those with which the run and the stages that it shares were made; several of one package have commas
    between them. `seconds` is machine time: a step that had one of two slots for 100 s counts 50 s. The stages that
    runs share are in `commands`, but not in `seconds`.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    files = {"metrics.jsonl": run.source / "brain" / "metrics.jsonl", "evaluation.json": run.source / "evaluation.json"}
    for name, source in files.items():
        if source.exists() and source != run.folder / name:
            shutil.copyfile(source, run.folder / name)
    markers = [marker for name in run.steps if (marker := state.marker(name)) is not None]
    data, names = state.marker(DATA_STEP), closure(plan.steps, run.steps)
    all_markers = [marker for name in plan.steps if name in names and (marker := state.marker(name)) is not None]
    record = {
        **described(run),
        "data_hash": None if data is None else hash_of(data["digests"]),
        "commands": [list(step.command) for name, step in plan.steps.items() if name in names],
        "started": markers[0]["started"],
        "ended": markers[-1]["ended"],
        "seconds": round(sum(marker["machine_seconds"] for marker in markers), 3),
        "versions": joined(each for marker in all_markers for each in marker["versions"]),
        "results": results(run, state),
    }
    write_json(run.folder / "run.json", record)


def described(run: Run) -> dict[str, Any]:
    """What a run is called, and what its setting changes."""
    return {
        "experiment": run.experiment,
        "setting": run.setting.name,
        "label": run.setting.label,
        "method": run.setting.method,
        "seed": run.seed,
        "settings": run.flags,
    }


def results(run: Run, state: State) -> dict[str, str]:
    """The hash of what decided the result of each of the run's own steps."""
    return {name: marker["result"] for name in run.steps if (marker := state.marker(name)) is not None}


def hash_of(digests: dict[str, str]) -> str:
    """SHA-256 of the lines `DIGEST  FILE` of the data's files, as `sha256sum` prints them."""
    lines = "".join(f"{digest}  {name.rsplit('/', 1)[-1]}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
