"""The descriptor of a stage: what other modules need to know of it before torch is imported.

The command line, the configuration, the data tools, the planner and the dry run read a stage's `StageSpec`; none of
them knows a stage by its name. A stage is a folder of `megatron_brain.stages` with its descriptor in `spec.py`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_brain.config.run import RunConfig
from megatron_brain.config.run_length import RunLength, length_by_epochs
from megatron_brain.errors import ConfigError, did_you_mean

Head = Literal["policy", "reward"]
"""Kind of head: log-probabilities of tokens (`policy`), or one number (`reward`)."""

COMMON_SECTIONS = ("model", "fp8", "parallel", "tokenizer", "data", "training", "checkpoint", "logging")
"""Sections that every stage reads."""

TRAINING_SECTIONS = ("optimizer", "guards")
"""Further sections that every stage with an optimizer reads."""


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """A setting that says where records are, by its section and its name, and the settings that choose from them."""

    section: str
    name: str
    split: str | None = None
    """Name of the setting of the data section for the split of a saved or hub data set."""
    limit: str | None = None
    """Name of the setting of `section` for the largest number of records."""
    holds: Literal["records", "rollouts"] = "records"
    """What the files hold: records for the stage's reader, or the rollouts of one round each."""
    trains: bool = True
    """Whether the length of the run depends on it."""
    reader: Callable[[RunConfig, Any], Any] | None = None
    """Makes the reader of its records, where that is not the one of the stage."""

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return "--" + self.name.replace("_", "-")

    def place(self, config: RunConfig) -> str | None:
        """The place of the records in the run's settings."""
        place: str | None = getattr(config.section(self.section), self.name)
        return place

    def chosen(self, config: RunConfig) -> tuple[str | None, int | None]:
        """Split and largest number of records."""
        split = None if self.split is None else getattr(config.data, self.split)
        return split, None if self.limit is None else getattr(config.section(self.section), self.limit)


TRAIN_DATA = RecordSource(section="data", name="train_data", split="train_split", limit="max_train_records")
VALID_DATA = RecordSource(
    section="data", name="valid_data", split="valid_split", limit="max_valid_records", trains=False
)
PROMPTS = RecordSource(section="generate", name="prompts", split="valid_split", limit="max_prompts")


@dataclass(frozen=True, kw_only=True)
class ScoringModel:
    """A frozen model that a stage uses for scores or comparison, on the policy's layout."""

    name: str
    """`prior`, `reward` or `baseline`; of several reward models `reward NAME`. No other model of the run has it."""
    flag: str
    """The flag that gives its checkpoint."""
    head: Head
    load: str | None
    """Its checkpoint; None: the checkpoint that the run starts from."""
    offloaded: bool = False
    """Whether its weights are in host memory while it does not score."""


def prior_and_rewards(config: RunConfig) -> tuple[ScoringModel, ...]:
    """The models of the scoring section: the prior, and the reward models where some are given."""
    scoring = config.scoring
    prior = ScoringModel(
        name="prior", flag="--prior-load", head="policy", load=scoring.prior_load, offloaded=scoring.offload_prior
    )
    models = [part for part in scoring.rewards if part.kind == "model"]
    return (
        prior,
        *(
            ScoringModel(
                name="reward" if len(models) == 1 else f"reward {part.name}",
                flag=part.flag,
                head="reward",
                load=part.source,
                offloaded=scoring.offload_reward,
            )
            for part in models
        ),
    )


def reward_code(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """The functions of the scoring section, each as the flag that names it and its `path/to/file.py:function`."""
    return tuple((part.flag, part.source) for part in config.scoring.rewards if part.kind == "function")


def judge_code(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """The judge of the scoring section, as `reward_code` gives functions."""
    judge = config.scoring.judge
    return () if judge is None else (("--judge", judge),)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run of a stage computes, as the planner and the dry run need it."""

    unit: str
    """The word for the samples of a batch, in the plural."""
    responses_per_prompt: int = 1
    """Responses of a group."""
    candidates_per_prompt: int | None = None
    """Responses drawn for a prompt, from which those of the group are chosen; None: no more than the group has."""
    packed: bool = False
    """Whether records are packed into sequences of --seq-length."""
    draws: bool = False
    """Whether the run draws responses."""
    answers_held_out: bool = False
    """Whether validations draw answers to held-out prompts."""
    scoring: tuple[ScoringModel, ...] = ()
    user_code: tuple[tuple[str, str], ...] = ()
    """Functions of the user, each as the flag that names it and its value `path/to/file.py:function`."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A place that a stage writes to, besides --save and --tensorboard-dir."""

    flag: str
    place: str | None
    is_folder: bool = False


def posterior_output(config: RunConfig) -> Output:
    """The file of --posterior-data, where the run writes it: one that exists is read."""
    place = config.posterior.posterior_data
    return Output(flag="--posterior-data", place=None if place is None or Path(place).exists() else place)


def _nothing(config: RunConfig) -> tuple[()]:
    return ()


def _count(config: RunConfig, items: Sequence[Any]) -> int:
    return len(items)


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A stage, without its code."""

    name: str
    """NAME in the command `python -m megatron_brain NAME`."""
    help: str
    """What the stage does, in one line."""
    code: str | Callable[[Any], Any]
    """The class of a stage that trains, a `training.trainer.Stage`, or the function of another stage. Both take the
    opened `training.run.Run`. Given as a place, `package.module:name`, it keeps torch out of the descriptor."""
    sections: tuple[str, ...]
    """Sections of the configuration that the stage reads besides `COMMON_SECTIONS`. Other sections' keys are errors. A
    stage with the section `optimizer` trains."""
    settings: Mapping[str, type] = field(default_factory=dict)
    """Sections that `RunConfig` has no field for: dataclasses by name, which `RunConfig.section` returns."""
    head: Head = "policy"
    """Head of the model that the stage builds."""
    linear_loss: bool = False
    """Whether the loss is linear in the log-probabilities: their gradient is then known before they are computed."""
    rounds: bool = False
    """Whether the stage trains in rounds of responses, not on a fixed list of samples."""
    require: Callable[[RunConfig], None]
    """Raises ConfigError where a setting is missing that the stage needs, or settings do not fit together."""
    sources: Callable[[RunConfig], Sequence[RecordSource]]
    """The places of the run's records. The first has those that the run trains on or answers."""
    reader: Callable[[RunConfig, Any], Any]
    """Makes the `data.records.RecordReader` of the stage's records from the configuration and the tokenizer."""
    reads: tuple[str, ...] = ()
    """Settings besides tokenizer and length limits that change how records are read; flags of the data tools."""
    num_samples: Callable[[RunConfig, Sequence[Any]], int] = _count
    """Number of samples that the stage makes from its records, given their items."""
    length: Callable[[RunConfig, int | None], RunLength] = length_by_epochs
    """Length of a run over so many samples; None: their number is not known."""
    work: Callable[[RunConfig], Work]
    """What the run computes."""
    outputs: Callable[[RunConfig], Sequence[Output]] = _nothing
    """The places that the run writes to, besides the checkpoints and metrics of a stage that trains."""

    def reader_of(self, source: RecordSource, config: RunConfig, tokenizer: Any) -> Any:
        """The `data.records.RecordReader` of a source."""
        return (source.reader or self.reader)(config, tokenizer)

    def load(self) -> Any:
        """The class or function of `code`; this imports its module."""
        return pkgutil.resolve_name(self.code) if isinstance(self.code, str) else self.code

    @property
    def all_sections(self) -> tuple[str, ...]:
        """All sections that the stage reads."""
        return (*COMMON_SECTIONS, *self.sections)

    @property
    def trains(self) -> bool:
        """Whether the stage has an optimizer."""
        return "optimizer" in self.sections


_registered: dict[str, StageSpec] = {}


def register_stage(spec: StageSpec) -> StageSpec:
    """Make a stage known to the command line, the configuration, the data tools, the planner and the dry run."""
    known = _registered.setdefault(spec.name, spec)
    assert known is spec, f"there are two stages called {spec.name}"
    return spec


def stages() -> Mapping[str, StageSpec]:
    """All registered stages by name, in the order of their registration."""
    return _registered


def stage_spec(name: str) -> StageSpec:
    """The descriptor of a stage.

    Raises:
        ConfigError: there is no such stage.
    """
    if name not in _registered:
        raise ConfigError(f"stage={name!r}: expected one of {', '.join(_registered)}{did_you_mean(name, _registered)}")
    return _registered[name]


def spec_of(config: RunConfig) -> StageSpec:
    """The descriptor of the stage that a configuration is for."""
    return stage_spec(config.stage)
