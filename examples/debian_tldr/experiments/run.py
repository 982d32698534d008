"""Run an experiment, or go on with it.

    python examples/debian_tldr/experiments/run.py baseline.yaml --max-minutes 120

An experiment is a YAML file beside this script, or any other. Every run of it is a chain of ordinary commands, which
`--dry-run` prints. Results go to `WORK/EXPERIMENT/SETTING/seed<S>/`. What is finished is skipped, and a run that was
interrupted goes on from its checkpoint. Exit status: 0 if all is done, 1 if a step failed, 2 for an error of the user,
3 if steps are left because the time was over or the runner was asked to stop (SIGTERM, Ctrl-C).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import user_errors
from execute import Executor, say
from lock import is_locked, locked
from plan import Plan, make_plan, tuning_warnings
from settings import FOLDER, ROOT
from state import OVER, State, now
from status import minutes_left, status_lines

SUCCESS, FAILED, LEFT = 0, 1, 3


def main() -> None:
    args = parse_args()
    work = args.work.resolve()
    path = args.experiment if args.experiment.exists() else FOLDER / args.experiment
    only, draft = args.only or [], args.dry_run or args.status
    plan = make_plan(path, work, only=only, seeds=args.seeds or [], draft=draft)
    state = State(work)
    if args.dry_run:
        print_commands(plan)
    if draft:
        print("\n".join(status_lines(plan, state, args.jobs, at_work=is_locked(work))))
        print("".join(f"WARNING: {warning}\n" for warning in tuning_warnings(plan)), end="")
        return
    with locked(work) as lock:
        sys.exit(run_session(plan, state, args, lock))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run an experiment, or go on with it.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="YAML file, such as baseline.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "experiments", help="folder of all results")
    parser.add_argument("--max-minutes", type=float, help="stop after so many minutes; a stage that runs saves first")
    parser.add_argument("--jobs", type=int, default=2, help="processes at one time, each with one thread")
    parser.add_argument("--only", action="append", metavar="SETTING", help="run this setting alone; may be repeated")
    parser.add_argument("--seeds", type=seed_list, metavar="S,S,...", help="run these seeds instead of the file's")
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="keep the checkpoints of finished runs (1.6 GB each)"
    )
    parser.add_argument("--rerun-changed", action="store_true", help="make steps of another configuration anew")
    parser.add_argument("--dry-run", action="store_true", help="print all commands and how long they take, and stop")
    parser.add_argument("--status", action="store_true", help="print what is done, under way and left, and stop")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if args.max_minutes is not None and args.max_minutes <= 0:
        parser.error("--max-minutes must be positive")
    return args


def seed_list(text: str) -> list[int]:
    """The numbers of `1,2,3`."""
    return [int(number) for number in text.split(",")]


def print_commands(plan: Plan) -> None:
    """Print every command of a plan, as one could type it in the checkout."""
    for name, value in next(iter(plan.steps.values())).environment.items():
        print(f"export {name}={shlex.quote(value)}")
    for step in plan.steps.values():
        print(f"\n# {step.name}, about {step.minutes:.1f} minutes\n{shlex.join(step.command)}")
    print()


def run_session(plan: Plan, state: State, args: argparse.Namespace, lock: int) -> int:
    """Run what is left, and return the exit status."""
    started, clock = now(), time.monotonic()
    conditions = state.conditions(plan.steps)
    left = [name for name, condition in conditions.items() if condition not in OVER]
    minutes = minutes_left(plan, state, conditions, args.jobs)
    say(f"{plan.experiment.name}: {len(left)} of {len(plan.steps)} steps are left, about {minutes:.0f} minutes")
    executor = Executor(
        plan,
        state,
        jobs=args.jobs,
        lock=lock,
        minutes=args.max_minutes,
        keep_checkpoints=args.keep_checkpoints,
        rerun_changed=args.rerun_changed,
    )
    status = None
    try:
        outcome = executor.run()
        status = FAILED if outcome.failed else LEFT if outcome.left else SUCCESS
    finally:
        entry = {"experiment": plan.experiment.name, "started": started, "jobs": args.jobs, "status": status}
        state.append("sessions", entry | {"seconds": round(time.monotonic() - clock, 1)})
    for warning in tuning_warnings(plan):
        say(f"WARNING: {warning}")
    for name, why in outcome.failed.items():
        say(f"FAILED: {name}: {why}")
    if outcome.left:
        minutes = minutes_left(plan, state, state.conditions(plan.steps), args.jobs)
        say(f"left: {len(outcome.left)} steps, about {minutes:.0f} minutes: {', '.join(outcome.left)}")
    else:
        say(f"{plan.experiment.name}: all {len(plan.steps)} steps are done")
    return status


if __name__ == "__main__":
    user_errors.run(main)
