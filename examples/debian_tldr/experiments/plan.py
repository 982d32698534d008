"""Expands an experiment into runs, and these into steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chain import Chain
from settings import Experiment, Flags, Setting, grid_name, read_experiment, read_sizes, read_yaml
from steps import Step
from user_errors import UserError

UNTUNED = "TUNED"
"""Stands in printed commands for a value that tuning has yet to choose."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A setting with a seed: a folder with `run.json`, `metrics.jsonl` and `evaluation.json`."""

    experiment: str
    setting: Setting
    seed: int
    folder: Path
    source: Path
    """Folder in which its steps leave their results: another run's where the setting is `same_as` that one's."""
    steps: tuple[str, ...]
    """The steps that no other seed or setting shares."""
    flags: Flags
    """Settings of the brain stage that the setting changes, with tuned ones."""

    @property
    def name(self) -> str:
        """Such as `baseline/none-k8/seed1`."""
        return f"{self.experiment}/{self.setting.name}/seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that an experiment does."""

    experiment: Experiment
    work: Path
    steps: dict[str, Step]
    """By name. Each comes after those that it needs."""
    runs: list[Run]


def make_plan(
    path: Path, work: Path, *, only: Sequence[str] = (), seeds: Sequence[int] = (), draft: bool = False
) -> Plan:
    """The plan of an experiment.

    Args:
        path: its YAML file.
        work: the folder of results.
        only: names of the settings to run; none: all.
        seeds: the seeds to run; none: those of the file.
        draft: whether tuned values may be missing, to show a plan that cannot run yet.

    Raises:
        UserError: the file is no experiment, a setting does not exist, or tuned values are missing.
    """
    experiment = read_experiment(path)
    names = [setting.name for setting in experiment.settings]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {', '.join(unknown)}: {path} has no such setting; it has {', '.join(names)}")
    planner = Planner(work, path.parent, draft=draft)
    runs = [
        planner.add_run(experiment, setting, seed)
        for seed in (seeds or experiment.seeds)
        for setting in experiment.settings
        if not only or setting.name in only
    ]
    if experiment.choose_by and not only:
        planner.add_choice(experiment, runs)
    return Plan(experiment=experiment, work=work, steps=planner.needed_steps(), runs=runs)


class Planner:
    """Collects the steps of runs. What several runs need is there once."""

    def __init__(self, work: Path, folder: Path, *, draft: bool) -> None:
        self._work, self._folder, self._draft = work, folder, draft
        self._candidates: dict[str, Step] = {}
        self._wanted: list[str] = []
        tuned = work / "tuned.yaml"
        self._tuned: dict[str, dict[str, Any]] = read_yaml(tuned) if tuned.exists() else {}

    def add_run(self, experiment: Experiment, setting: Setting, seed: int) -> Run:
        """Add a run with all that it needs.

        Raises:
            UserError: a value that is to be tuned is not, or the setting that this one is the same as does not exist.
        """
        if setting.same_as is not None:
            run = self.add_run(*self._find(setting), seed)
            named = replace(run.setting, name=setting.name, label=setting.label, method=setting.method)
            return replace(
                run, experiment=experiment.name, setting=named, folder=self._folder_of(experiment, named, seed)
            )
        sizes = read_sizes(experiment)
        chain, folder = Chain(self._work, sizes), self._folder_of(experiment, setting, seed)
        name = f"{experiment.name}/{setting.name}/seed{seed}"
        changed = {**setting.flags, **self._tuned_flags(setting)}
        if setting.best_of is not None:
            steps = [chain.best_of(name, seed, setting.best_of)]
        else:
            flags = {**sizes.brain, **experiment.flags, **changed}
            steps = [chain.brain(name, seed, flags, setting.data, may_diverge=setting.choose_by is not None)]
            steps += [chain.evaluate(name, seed)] if experiment.evaluate else []
        for step in (*chain.shared_steps(), *chain.seed_steps(seed), *steps):
            known = self._candidates.setdefault(step.name, step)
            if known.command != step.command:
                raise UserError(f"{name}: asks for another {step.name} than the other runs; give it the same sizes")
        own = tuple(step.name for step in steps)
        self._wanted += own
        return Run(
            experiment=experiment.name,
            setting=setting,
            seed=seed,
            folder=folder,
            source=folder,
            steps=own,
            flags=changed,
        )

    def add_choice(self, experiment: Experiment, runs: Sequence[Run]) -> None:
        """Add the step that chooses the best value of every grid and writes it to `WORK/tuned.yaml`."""
        chain = Chain(self._work, read_sizes(experiment))
        iterations = [self._candidates[f"{run.name}/brain"].iterations for run in runs]
        compared = [
            (run.setting, run.name, last) for run, last in zip(runs, iterations, strict=True) if last is not None
        ]
        step = chain.choice(experiment.name, compared)
        self._candidates[step.name] = step
        self._wanted.append(step.name)

    def needed_steps(self) -> dict[str, Step]:
        """The steps that the added runs need, each after those that it needs itself."""
        needed = closure(self._candidates, self._wanted)
        # Whatever belongs to no run comes first, so that a run can start as soon as its seed's stages are there.
        ordered = sorted(self._candidates, key=lambda name: not name.startswith("shared/"))
        return {name: self._candidates[name] for name in ordered if name in needed}

    def _find(self, setting: Setting) -> tuple[Experiment, Setting]:
        """The experiment and setting that `same_as` names."""
        file, _, name = str(setting.same_as).partition("/")
        experiment = read_experiment(self._folder / f"{file}.yaml")
        for other in experiment.settings:
            if other.name == name and other.same_as is None:
                return experiment, other
        raise UserError(
            f"setting {setting.name}: same_as={setting.same_as}: {file}.yaml has no such setting of its own"
        )

    def _tuned_flags(self, setting: Setting) -> Flags:
        if setting.tuned is None:
            return {}
        if flags := self._tuned.get(setting.tuned, {}).get("flags"):
            return flags
        if self._draft:
            return {"lr": UNTUNED}
        raise UserError(
            f"setting {setting.name}: {self._work / 'tuned.yaml'} has no values for {setting.tuned}; "
            + (
                f"{'; '.join(self._tuned[setting.tuned]['warnings'])}, in tuning.yaml"
                if setting.tuned in self._tuned
                else f"run run.py tuning.yaml --work {self._work} first"
            )
        )

    def _folder_of(self, experiment: Experiment, setting: Setting, seed: int) -> Path:
        return self._work / experiment.name / setting.name / f"seed{seed}"


def tuning_warnings(plan: Plan) -> list[str]:
    """What `WORK/tuned.yaml` says against the values that a plan's settings use, or that it chose itself."""
    path = plan.work / "tuned.yaml"
    tuned = read_yaml(path) if path.exists() else {}
    settings = [run.setting for run in plan.runs]
    names = dict.fromkeys(grid_name(setting) if setting.choose_by else setting.tuned for setting in settings)
    return [
        f"{path}: {name}: {warning}" for name in names if name in tuned for warning in tuned[name].get("warnings", ())
    ]


def closure(steps: Mapping[str, Step], names: Iterable[str]) -> set[str]:
    """The names of steps and of all that these need."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += steps[name].needs
    return found
