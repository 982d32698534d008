"""Runs the steps of a plan, several at one time, until all is done, time is up, or nothing can go on."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime

from plan import Plan, Run
from records import is_recorded, write_record
from settings import ROOT
from state import OVER, Condition, State, are_ready, now, saved_iteration
from steps import Step
from user_errors import UserError

INTERPRETERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
"""What the first word of a command stands for."""
STOP_MINUTES = 10.0
"""How long a stage that is asked to stop may take for its step and its checkpoint; then it is killed."""
LEAST_MINUTES = 3.0
"""A step that goes on from checkpoints is not started with less time left than this: its start takes a part of it."""
POLL_SECONDS = 0.2
LAST_LINES = 5


@dataclass
class Job:
    """A command that runs."""

    step: Step
    process: subprocess.Popen
    started: str
    clock: float
    log_start: int
    """Place in its log, in bytes, where its output begins."""


@dataclass(frozen=True)
class Outcome:
    """How a session ended."""

    failed: dict[str, str]
    """Why steps failed, by name."""
    left: list[str]
    """Steps that are not finished, failed ones included."""


class Executor:
    """One session.

    Args:
        plan: what to do.
        state: what was done.
        jobs: processes that run at one time.
        lock: descriptor that commands inherit, so that the lock is held as long as one of them runs.
        minutes: how long the session may last; None: as long as it takes.
        keep_checkpoints: whether the checkpoints of finished runs stay, even if the experiment does not ask for that.
        rerun_changed: whether steps that were made with another configuration are made anew.
    """

    def __init__(
        self,
        plan: Plan,
        state: State,
        *,
        jobs: int,
        lock: int,
        minutes: float | None = None,
        keep_checkpoints: bool = False,
        rerun_changed: bool = False,
    ) -> None:
        self._plan, self._state, self._jobs, self._lock = plan, state, jobs, lock
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._keep = keep_checkpoints or plan.experiment.keep_checkpoints
        self._rerun_changed = rerun_changed
        self._running: dict[str, Job] = {}
        self._failed: dict[str, str] = {}
        self._stopped: set[str] = set()
        self._signal: str | None = None
        self._asked_at: float | None = None
        self._conditions: dict[str, Condition] = {}

    def run(self) -> Outcome:
        """Run what is left.

        Raises:
            UserError: steps were made with another configuration, and `rerun_changed` is false.
        """
        self._look()
        if changed := [name for name, condition in self._conditions.items() if condition == "changed"]:
            if not self._rerun_changed:
                raise UserError(self._refusal(changed))
            say(f"made anew, because the configuration changed: {', '.join(changed)}")
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        finally:
            self._kill("the runner ends")
            for number, handler in previous.items():
                signal.signal(number, handler)
        return Outcome(
            failed=self._failed,
            left=[name for name, condition in self._conditions.items() if condition not in OVER],
        )

    def _refusal(self, changed: list[str]) -> str:
        step = self._plan.steps[changed[0]]
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return (
            f"{step.name}{others} was made with another configuration: {self._state.difference(step)}. Nothing is "
            "mixed: --rerun-changed makes it and what depends on it anew, another --work keeps both"
        )

    def _loop(self) -> None:
        while True:
            if self._signal is not None:
                self._ask_to_stop(self._signal)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._ask_to_stop("--max-minutes is over")
            if self._asked_at is None:
                self._start_ready()
            if not self._running:
                return
            time.sleep(POLL_SECONDS)
            for job in list(self._running.values()):
                before = children_cpu_seconds()
                if job.process.poll() is not None:
                    del self._running[job.step.name]
                    self._ended(job, children_cpu_seconds() - before)
                    self._look()
            if self._asked_at is not None and time.monotonic() - self._asked_at > 60 * STOP_MINUTES:
                self._kill(f"it has not ended {STOP_MINUTES:g} minutes after SIGTERM")

    def _look(self) -> None:
        """See where every step stands, and close the runs that are finished."""
        self._conditions = self._state.conditions(self._plan.steps)
        for run in self._plan.runs:
            found = {self._conditions[name] for name in run.steps}
            if not found <= set(OVER):
                continue
            if found == {"done"} and not is_recorded(run, self._state):
                write_record(self._plan, run, self._state)
                say(f"{run.name}: finished, {run.folder / 'run.json'}")
            if not self._keep:
                self._remove_checkpoints(run)

    def _remove_checkpoints(self, run: Run) -> None:
        for step in (self._plan.steps[name] for name in run.steps):
            if step.resumes and step.checkpoint is not None and saved_iteration(step.checkpoint) is not None:
                self._state.forget_checkpoint(step)
                say(f"{step.name}: removed its checkpoints; --keep-checkpoints keeps those of later runs")

    def _start_ready(self) -> None:
        """Start steps in the order of the plan, as long as there are free slots."""
        for name, step in self._plan.steps.items():
            over = self._conditions[name] in OVER or name in self._failed or name in self._stopped
            if over or name in self._running or not are_ready(step, self._conditions):
                continue
            if self._conditions[name] == "changed" and not self._rerun_changed:
                self._failed[name] = self._refusal([name])
                say(f"{name}: {self._failed[name]}")
                continue
            if not self._is_time_for(step):
                continue
            free = self._jobs - sum(min(job.step.slots, self._jobs) for job in self._running.values())
            if min(step.slots, self._jobs) > free:
                # A step of several processes would wait for ever if others filled each slot as it becomes free.
                return
            self._start(step)

    def _is_time_for(self, step: Step) -> bool:
        """Whether there is time for the whole step, or for a part of one that goes on from its checkpoint."""
        if self._deadline is None:
            return True
        needed = min(step.minutes, LEAST_MINUTES) if step.resumes else step.minutes
        return time.monotonic() + 60 * needed <= self._deadline

    def _start(self, step: Step) -> None:
        self._state.begin(step)
        for run in self._plan.runs:
            if step.name in run.steps:
                (run.folder / "run.json").unlink(missing_ok=True)
        log = self._state.log_path(step.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{step.name}: starts, about {step.minutes:.1f} minutes; {log}")
        with log.open("a", encoding="utf-8") as output:
            output.write(f"\n{now()} {shlex.join(step.command)}\n")
            output.flush()
            log_start = output.tell()
            process = subprocess.Popen(
                [*INTERPRETERS[step.command[0]], *step.command[1:]],
                cwd=ROOT,
                env=os.environ | step.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock,),
                start_new_session=True,  # The terminal's Ctrl-C reaches the runner alone, which then stops its steps.
            )
        self._running[step.name] = Job(step, process, now(), time.monotonic(), log_start)

    def _ended(self, job: Job, cpu_seconds: float) -> None:
        step, status = job.step, job.process.returncode
        seconds = time.monotonic() - job.clock
        why = self._why_unfinished(step) if status == 0 else f"ended with status {status}"
        outcome = self._outcome(job, why)
        times = {"seconds": seconds, "machine_seconds": seconds * min(step.slots, self._jobs) / self._jobs}
        self._state.add_time(step, job.started, {**times, "cpu_seconds": cpu_seconds}, outcome)
        if why is None:
            self._state.finish(step)
            say(f"{step.name}: finished after {seconds / 60:.1f} minutes")
        elif outcome == "diverged":
            self._state.diverge(step, why)
            say(f"{step.name}: diverged, its numbers are not finite any more; {self._state.log_path(step.name)}")
        elif outcome == "stopped":
            self._stopped.add(step.name)
            say(f"{step.name}: stopped, {why}")
        else:
            log = self._state.log_path(step.name)
            self._failed[step.name] = f"{why}; its output is in {log}"
            say(f"{step.name}: FAILED, {self._failed[step.name]}")
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]:
                print(f"    {line}", flush=True)

    def _outcome(self, job: Job, why: str | None) -> str:
        """What is told of a command that ended.

        Args:
            why: why its step is not finished; None where it is.
        """
        step, status = job.step, job.process.returncode
        if why is None:
            return "finished"
        # A status below 0 is a signal: it says nothing of the numbers.
        if step.may_diverge and status > 0 and "FloatingPointError" in self._output(job):
            return "diverged"
        stops_early = status == 0 and step.resumes and self._is_short(step)
        return "stopped" if stops_early or self._asked_at is not None else "failed"

    def _output(self, job: Job) -> str:
        """What a command has printed."""
        text = self._state.log_path(job.step.name).read_bytes()[job.log_start :]
        return text.decode(errors="replace")

    def _is_short(self, step: Step) -> bool:
        """Whether the last checkpoint of a training stage is not that of its last iteration."""
        if step.iterations is None or step.checkpoint is None:
            return False
        return saved_iteration(step.checkpoint) != step.iterations

    def _why_unfinished(self, step: Step) -> str | None:
        """Why a command that ended well has not finished its step; None where it has."""
        if step.checkpoint is not None and self._is_short(step):
            return f"at iteration {saved_iteration(step.checkpoint) or 0} of {step.iterations}"
        missing = [str(path) for path in step.outputs if not path.exists()]
        return f"without {', '.join(missing)}" if missing else None

    def _on_signal(self, number: int, _frame: object) -> None:
        # To print here could meet a print that the signal has interrupted, which is an error.
        self._signal = signal.Signals(number).name

    def _ask_to_stop(self, why: str) -> None:
        """Start nothing more, and let the steps that run save and end."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            say(f"{why}: asks {', '.join(self._running) or 'nothing'} to save and end")
            for job in self._running.values():
                job.process.send_signal(signal.SIGTERM)

    def _kill(self, why: str) -> None:
        for job in self._running.values():
            say(f"{job.step.name}: killed, because {why}")
            os.killpg(job.process.pid, signal.SIGKILL)


def children_cpu_seconds() -> float:
    """CPU time of all ended children and of those that they waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)
