"""The runner of the Debian task's experiments, importable, and plans of stub commands for it."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from helpers.debian_tldr import EXAMPLE

FOLDER = EXAMPLE / "experiments"
MODULES = (
    "user_errors",
    "settings",
    "steps",
    "versions",
    "chain",
    "plan",
    "state",
    "lock",
    "records",
    "execute",
    "status",
    "choose",
    "run",
)

TRAIN = """
import json, signal, sys, time
from pathlib import Path
folder, last = Path(sys.argv[1]), int(sys.argv[2])
slow = Path(str(folder) + ".slow")
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
folder.mkdir(parents=True, exist_ok=True)
latest = folder / "latest_checkpointed_iteration.txt"
done = int(latest.read_text()) if latest.exists() else 0
print("begins after", done, flush=True)
def save():
    (folder / f"iter_{done:07d}").mkdir(exist_ok=True)
    latest.write_text(str(done))
with (folder / "metrics.jsonl").open("a") as file:
    while done < last and not stopping:
        done += 1
        print(json.dumps({"iteration": done}), file=file, flush=True)
        time.sleep(0.02 if slow.exists() else 0)
save()
"""
"""Trains, saves its last iteration, and goes on from it: folder, iterations. A file FOLDER.slow slows it down."""


@contextmanager
def importable():
    """The modules of the runner. They are importable only while their folders are on the path."""
    folders = [str(FOLDER), str(EXAMPLE)]
    sys.path[:0] = folders
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name in MODULES:
            sys.modules.pop(name, None)


class StubPlans:
    """Makes plans whose commands are stubs, in one WORK.

    Args:
        modules: the runner's modules.
        work: the folder of results.
    """

    def __init__(self, modules: SimpleNamespace, work: Path) -> None:
        self.modules, self.work = modules, work

    def script(self, name: str, code: str, *words: object, outputs=(), needs=(), **more):
        """A step that runs Python code; `argv[1]` is the first of `words`. By default its outputs are its own."""
        outputs = tuple(self.work / output for output in outputs)
        return self.modules.steps.Step(
            name=name,
            command=("python", "-c", code, *map(str, words)),
            needs=tuple(needs),
            outputs=outputs,
            environment={},
            **{"kind": "stub", "minutes": 0.01, "fresh": outputs} | more,
        )

    def write(self, name: str, text: str, needs=(), **more):
        """A step that writes a text to a file of its name and adds a line to `calls`."""
        code = (
            "import sys; from pathlib import Path; work, name, text = sys.argv[1:]; work = Path(work); "
            "(work / name).parent.mkdir(parents=True, exist_ok=True); (work / name).write_text(text); "
            "open(work / 'calls', 'a').write(name + chr(10))"
        )
        return self.script(name, code, self.work, name, text, outputs=[name], needs=needs, **more)

    def train(self, name: str, iterations: int, *, needs=(), **more):
        """A step that trains and goes on where it was stopped."""
        folder = self.work / name
        files = [folder / "latest_checkpointed_iteration.txt", folder / "metrics.jsonl"]
        given = {"fresh": (folder,), "checkpoint": folder, "iterations": iterations, "resumes": True} | more
        return self.script(name, TRAIN, folder, iterations, outputs=files, needs=needs, **given)

    def plan(self, *steps, runs=()):
        """A plan of steps, and of runs given as (name, names of steps)."""
        plan = self.modules.plan
        experiment = self.modules.settings.Experiment(name="stub", question="", seeds=[1], settings=[])
        made = [
            plan.Run(
                experiment="stub",
                setting=self.modules.settings.Setting(name=name, label=name.upper()),
                seed=1,
                folder=self.work / "stub" / name / "seed1",
                source=self.work / "stub" / name / "seed1",
                steps=tuple(own),
                flags={"lr": 0.5},
            )
            for name, own in runs
        ]
        return plan.Plan(experiment=experiment, work=self.work, steps={step.name: step for step in steps}, runs=made)

    def conditions(self, plan):
        """What the runner finds of each step, by its name."""
        return self.modules.state.State(self.work).conditions(plan.steps)

    def run(self, plan, **options):
        """Run what is left of a plan; returns its outcome."""
        with self.modules.lock.locked(self.work) as lock:
            state = self.modules.state.State(self.work)
            return self.modules.execute.Executor(plan, state, **{"jobs": 2, "lock": lock} | options).run()

    def slow(self, name: str) -> Path:
        """Make a `train` step slow, as long as the returned file is there."""
        path = self.work / f"{name}.slow"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def calls(self) -> list[str]:
        """Names of the `write` steps whose commands ran, in their order."""
        path = self.work / "calls"
        return path.read_text().split() if path.exists() else []
