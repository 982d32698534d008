"""What WORK knows of the steps: their markers, and the log of times.

WORK/state/STEP.json     a step that has begun, or is finished, with all that decides its result
WORK/log/STEP.log        output of its command
WORK/log/steps.jsonl     one line for every time that a command ran: step, start, seconds, outcome
WORK/log/sessions.jsonl  one line for every time that the runner ran
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from steps import Step, file_hash, own_identity, result_hash
from versions import versions

Condition = Literal["done", "diverged", "begun", "new", "changed"]
OVER: tuple[Condition, ...] = ("done", "diverged")
"""Conditions of steps that are not started again."""


def now() -> str:
    """The time as an ISO date with the zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def write_json(path: Path, content: Any) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


class State:
    """The markers of the steps in a WORK."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def marker(self, name: str) -> dict[str, Any] | None:
        """What is known of a step; None for one that has never begun."""
        path = self._marker_path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def log_path(self, name: str) -> Path:
        """The file with the output of a step's command."""
        return self.work / "log" / f"{name}.log"

    def conditions(self, steps: Mapping[str, Step]) -> dict[str, Condition]:
        """Where every step stands. The steps come after those they need.

        `diverged` is a step whose numbers were not finite any more, where that is a result. `changed` is a step that
        has begun, or is finished, with another command, other settings or other results of the steps it needs than it
        would have now. `begun` is one that was interrupted, or whose outputs are gone, or that has to wait for steps it
        needs before one can tell.
        """
        found: dict[str, Condition] = {}
        for name, step in steps.items():
            found[name] = self._condition(step, found)
        # A policy whose checkpoint was removed must be trained again where a step still has to load it.
        for name, step in steps.items():
            for needed in step.loads:
                if found[name] != "done" and found[needed] == "done" and self._known(needed)["removed"]:
                    found[needed] = "new"
        return found

    def _condition(self, step: Step, of_needs: Mapping[str, Condition]) -> Condition:
        marker = self.marker(step.name)
        if marker is None:
            return "new"
        own = own_identity(step, self.work)
        same = all(marker["identity"].get(key) == value for key, value in own.items())
        if not same or any(of_needs[name] == "changed" for name in step.needs):
            return "changed"
        if not are_ready(step, of_needs):
            return "begun"
        if marker["identity"]["needs"] != self._results(step):
            return "changed"
        if marker["diverged"]:
            return "diverged"
        whole = marker["removed"] or all(path.exists() for path in step.outputs)
        return "done" if marker["done"] and whole else "begun"

    def difference(self, step: Step) -> str:
        """What of a changed step is not as it was, in words."""
        was, own = self._known(step.name)["identity"], own_identity(step, self.work)
        if was["command"] != own["command"]:
            gone = [word for word in was["command"] if word not in own["command"]]
            come = [word for word in own["command"] if word not in was["command"]]
            return f"its command had {' '.join(gone) or 'nothing'} where it now has {' '.join(come) or 'nothing'}"
        if was.get("megatron_brain") != own["megatron_brain"]:
            return f"megatron_brain was {was.get('megatron_brain')} and is {own['megatron_brain']}"
        if files := [name for name in own["reads"] if was["reads"].get(name) != own["reads"][name]]:
            return f"{', '.join(files)} had another content"
        return "a step that it needs was or will be made anew"

    def begin(self, step: Step) -> None:
        """Mark a step as begun. Unless it goes on from its checkpoint, what it left behind is removed first."""
        identity = own_identity(step, self.work) | {"needs": self._results(step)}
        marker = self.marker(step.name)
        goes_on = step.resumes and step.checkpoint is not None and saved_iteration(step.checkpoint) is not None
        if marker is None or marker["identity"] != identity or not goes_on:
            times = {"seconds": 0.0, "machine_seconds": 0.0, "cpu_seconds": 0.0}
            marker = {"started": now(), "versions": [], **times}
            self.clear(step)
        marker |= {"identity": identity, "done": False, "diverged": False, "removed": False}
        marker |= {"kind": step.kind, "minutes": step.minutes, "versions": _with_versions(marker)}
        write_json(self._marker_path(step.name), marker)

    def clear(self, step: Step) -> None:
        """Remove what a step left behind, but not what it takes from an earlier run by itself."""
        for path in step.fresh:
            assert self.work in path.parents, f"{path} is not in {self.work}"
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def add_time(self, step: Step, started: str, times: Mapping[str, float], outcome: str) -> None:
        """Count the times of a command that ended.

        Args:
            times: `seconds` by the clock, `machine_seconds` for which it had the whole machine, and `cpu_seconds`.
        """
        marker = self._known(step.name)
        for name, value in times.items():
            marker[name] += value
        write_json(self._marker_path(step.name), marker)
        rounded = {name: round(value, 3) for name, value in times.items()}
        self.append("steps", {"step": step.name, "started": started, **rounded, "outcome": outcome})

    def append(self, log: str, entry: Mapping[str, Any]) -> None:
        """Add a line to `WORK/log/LOG.jsonl`."""
        path = self.work / "log" / f"{log}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def finish(self, step: Step) -> None:
        """Mark a step as finished."""
        marker = self._known(step.name)
        digests = {str(path.relative_to(self.work)): file_hash(path) for path in step.digests}
        marker |= {"done": True, "ended": now(), "digests": digests, "versions": _with_versions(marker)}
        marker["result"] = result_hash(marker["identity"], digests)
        write_json(self._marker_path(step.name), marker)

    def diverge(self, step: Step, why: str) -> None:
        """Mark a step as one that has diverged. What it left behind stays."""
        marker = self._known(step.name) | {"diverged": True, "ended": now(), "why": why}
        marker["result"] = result_hash(marker["identity"], {"diverged": why})
        write_json(self._marker_path(step.name), marker)

    def forget_checkpoint(self, step: Step) -> None:
        """Remove the checkpoints of a step that is over. Its metrics stay."""
        assert step.checkpoint is not None and self.work in step.checkpoint.parents
        marker = self._known(step.name)
        write_json(self._marker_path(step.name), marker | {"removed": True})
        for folder in step.checkpoint.glob("iter_*"):
            shutil.rmtree(folder)
        (step.checkpoint / "latest_checkpointed_iteration.txt").unlink(missing_ok=True)

    def _results(self, step: Step) -> dict[str, str]:
        return {name: self._known(name)["result"] for name in step.needs}

    def _known(self, name: str) -> dict[str, Any]:
        marker = self.marker(name)
        assert marker is not None, f"{name} has never begun"
        return marker

    def _marker_path(self, name: str) -> Path:
        return self.work / "state" / f"{name}.json"


def _with_versions(marker: Mapping[str, Any]) -> list[dict[str, str]]:
    """The different versions with which a step began, went on and ended, those of now included."""
    known, current = list(marker["versions"]), versions()
    return known if current in known else [*known, current]


def are_ready(step: Step, conditions: Mapping[str, Condition]) -> bool:
    """Whether all that a step needs is there."""
    return all(conditions[need] in (OVER if step.takes_diverged else ("done",)) for need in step.needs)


def saved_iteration(checkpoint: Path) -> int | None:
    """The iteration of the last whole checkpoint in a folder; None where there is none."""
    path = checkpoint / "latest_checkpointed_iteration.txt"
    return int(path.read_text(encoding="utf-8")) if path.exists() else None
