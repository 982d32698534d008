"""Reads the YAML files of the experiments: what is compared (an experiment), and how large everything is (sizes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from choose import CRITERIA
from user_errors import UserError

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
"""The checkout. All commands run in it."""

Flags = dict[str, Any]
"""Settings of a stage by name: `lr: 1e-5` is `--lr 1e-5`, true is `--flag`, false is `--no-flag`."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the stages of all experiments are: a block of `common.yaml`."""

    model: str
    """`real` fetches SmolLM2-135M and MiniLM, `smoke` makes a tiny random model and judges by ROUGE alone."""
    sft_records: int
    sft_iters: int
    sft_valid: int
    pair_prompts: int
    pair_packages: int
    pairs: int
    reward_iters: int
    brain_prompts: int
    """Training prompts from which runs draw, the same file for all of them."""
    test_prompts: int
    test_posterior_samples: int
    test_posterior_prompts: int
    valid_prompts: int
    valid_posterior_samples: int
    sft: Flags = field(default_factory=dict)
    reward: Flags = field(default_factory=dict)
    evaluate: Flags = field(default_factory=dict)
    brain: Flags = field(default_factory=dict)
    """Settings of every run of the brain stage. An experiment and its settings may change them."""
    minutes: dict[str, float] = field(default_factory=dict)
    """Minutes that a step of each kind takes while all jobs run. `brain` are those of a run's start and end,
    `validation` those of one, `brain_per_1000` those of 1000 responses, `candidates_per_1000` those of 1000 candidates
    of RSO."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One thing that an experiment compares."""

    name: str
    """Its folder."""
    label: str
    """Its name in tables and figures."""
    method: str = "brain"
    """What trains: `brain`, `dpo` and so on, as text for the report; or `best-of-n`, which trains nothing."""
    flags: Flags = field(default_factory=dict)
    """Settings of the brain stage that it changes."""
    data: str = "prompts"
    """`prompts`, or `pairs` for `--responses given`."""
    tuned: str | None = None
    """Name under which `WORK/tuned.yaml` has more flags of it."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """One flag and the values to try: each makes a setting `NAME-FLAGVALUE`. Default: that of the experiment."""
    choose_by: str | None = None
    """By which criterion of `choose.py` the best value of its `grid` is chosen. Default: that of the experiment."""
    same_as: str | None = None
    """`EXPERIMENT/SETTING`: the runs are those of another experiment."""
    like: str | None = None
    """`EXPERIMENT/SETTING`: label, method, data and flags are those of another experiment where it has none itself."""
    best_of: int | None = None
    """With method `best-of-n`: n."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A file such as `baseline.yaml`."""

    name: str
    question: str
    seeds: list[int]
    settings: list[Setting]
    flags: Flags = field(default_factory=dict)
    """Settings of the brain stage that all settings of the experiment change."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """The grid of settings that have none."""
    evaluate: bool = True
    """Whether the trained policies are evaluated on held-out prompts."""
    keep_checkpoints: bool = False
    """Whether the checkpoints of finished runs stay."""
    choose_by: str | None = None
    """By which criterion of `choose.py` the best value of each `grid` is chosen, unless a setting has its own."""
    smoke: bool = False
    """Whether it runs with the `smoke` block of `common.yaml`."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Sizes of `common.yaml` that it changes. Those that shared stages read must be the same in all of a WORK."""


T = TypeVar("T", Sizes, Setting, Experiment)


def read_yaml(path: Path) -> Any:
    """Read a YAML file in which no key stands twice.

    Raises:
        UserError: it is no YAML, or a key stands twice in one mapping.
    """
    try:
        loader = _UniqueKeys(path.read_text(encoding="utf-8"))
        loader.name = str(path)  # Marks name it.
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{node.start_mark.name}, line {node.start_mark.line + 1}: {key!r} stands twice")
        return super().construct_mapping(node, deep)


def read_sizes(experiment: Experiment, path: Path = FOLDER / "common.yaml") -> Sizes:
    """The sizes of an experiment."""
    blocks, block = read_yaml(path), "smoke" if experiment.smoke else "full"
    if not isinstance(blocks, dict) or block not in blocks:
        raise UserError(f"{path}: has no block {block!r}")
    return build(Sizes, {**blocks[block], **experiment.sizes}, f"{path}, {block}, with sizes of {experiment.name}")


def read_experiment(path: Path) -> Experiment:
    """Read an experiment. Its name is that of the file.

    Raises:
        UserError: the file is not there, or what it has is not an experiment; names the place.
    """
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in FOLDER.glob("*.yaml") if file.name != "common.yaml"))
        raise UserError(f"{path}: there is no such experiment; there are {known}")
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("settings"), list):
        raise UserError(f"{path}: needs a list `settings`")
    settings = []
    for number, entry in enumerate(content["settings"], start=1):
        place = f"{path}, setting {number}"
        usual = {"grid": content.get("grid", {}), "choose_by": content.get("choose_by")}
        completed = {**usual, **complete(entry, path.parent, place)}
        setting = build(Setting, completed, place)
        _check(setting, f"{path}, setting {setting.name}")
        settings += expand_grid(setting)
    names = [setting.name for setting in settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two settings are called {', '.join(twice)}")
    experiment = build(Experiment, {**content, "name": path.stem, "settings": settings}, str(path))
    for setting in settings:
        if setting.choose_by and not setting.grid:
            raise UserError(f"{path}, setting {setting.name}: choose_by compares the values of a grid, and it has none")
    if not experiment.seeds or len(set(experiment.seeds)) != len(experiment.seeds):
        raise UserError(f"{path}: seeds={experiment.seeds} must be different numbers, at least one")
    return experiment


def complete(entry: Any, folder: Path, place: str) -> dict[str, Any]:
    """A setting of a file with what it takes from the setting that its `like` names.

    Raises:
        UserError: it is no mapping, or there is no such setting.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{place}: expected keys and values, found {entry!r}")
    if "like" not in entry:
        return entry
    file, _, name = str(entry["like"]).partition("/")
    found = [other for other in read_yaml(folder / f"{file}.yaml")["settings"] if other["name"] == name]
    if not found:
        raise UserError(f"{place}: like={entry['like']}: {file}.yaml has no such setting")
    taken = {key: value for key, value in found[0].items() if key in ("label", "method", "data")}
    return taken | entry | {"flags": found[0].get("flags", {}) | entry.get("flags", {})}


def expand_grid(setting: Setting) -> list[Setting]:
    """The settings of a `grid`, or the setting itself."""
    if not setting.grid:
        return [setting]
    ((flag, values),) = setting.grid.items()
    taken = {one.name: getattr(setting, one.name) for one in fields(setting)}
    return [
        Setting(
            **{
                **taken,
                "name": f"{setting.name}-{flag}{value:g}",
                "label": f"{setting.label}, {flag} {value:g}",
                "flags": {**setting.flags, flag: value},
                "grid": {flag: [value]},
            }
        )
        for value in values
    ]


def grid_name(setting: Setting) -> str:
    """The name in the file of a setting that `expand_grid` made."""
    ((flag, (value,)),) = setting.grid.items()
    return setting.name.removesuffix(f"-{flag}{value:g}")


def _check(setting: Setting, place: str) -> None:
    if setting.data not in ("prompts", "pairs"):
        raise UserError(f"{place}: data={setting.data!r} must be prompts or pairs")
    if setting.choose_by not in (None, *CRITERIA):
        raise UserError(f"{place}: choose_by={setting.choose_by!r} must be one of {', '.join(CRITERIA)}")
    if len(setting.grid) > 1:
        raise UserError(f"{place}: grid has {len(setting.grid)} flags; give one")
    for flag, values in setting.grid.items():
        if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
            raise UserError(
                f"{place}: grid {flag}={values!r} must be a list of numbers; YAML reads 1e-5 as text, so write 1.0e-5"
            )
    if (setting.best_of is None) == (setting.method == "best-of-n"):
        raise UserError(f"{place}: method best-of-n and a number `best_of` go together")
    if setting.same_as is not None and (setting.flags or setting.tuned or setting.grid or setting.best_of):
        raise UserError(f"{place}: same_as takes the runs as they are; leave out flags, tuned, grid and best_of")


_TYPES = {"str": str, "int": int, "bool": bool, "list": list, "dict": dict, "Flags": dict}


def build(kind: type[T], entry: Any, place: str) -> T:
    """Make a dataclass of a mapping.

    Raises:
        UserError: a key is unknown or missing, or a value has another type; names the place.
    """
    if not isinstance(entry, Mapping):
        raise UserError(f"{place}: expected keys and values, found {entry!r}")
    known = {one.name: one for one in fields(kind)}
    if unknown := sorted(set(entry) - set(known)):
        raise UserError(f"{place}: unknown key {', '.join(map(str, unknown))}; known are {', '.join(known)}")
    missing = [
        name
        for name, one in known.items()
        if name not in entry and one.default is MISSING and one.default_factory is MISSING
    ]
    if missing:
        raise UserError(f"{place}: needs {', '.join(missing)}")
    for name, value in entry.items():
        # Types are texts here, such as `list[int]` and `int | None`.
        expected = _TYPES[str(known[name].type).split("[")[0].split(" ")[0]]
        if value is None and "None" in str(known[name].type):
            continue
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise UserError(f"{place}: {name}={value!r} must be a {expected.__name__}")
    return kind(**entry)
