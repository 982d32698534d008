"""Looks for layouts: each candidate is the configuration of a run, checked as a run checks it, and then estimated."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_brain.config.checks import require, validate_layout
from megatron_brain.config.fields import stage_fields
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.loader import config_from_dict
from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import stage_spec, stages
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import architecture, resolve
from megatron_brain.planning.machine import GIB, Machine
from megatron_brain.planning.memory import Memory, pipeline_stage_memory
from megatron_brain.planning.rounds import step_time
from megatron_brain.planning.time import StepTime
from megatron_brain.planning.workload import Layout, Precision, Recompute, Workload, from_run_config

Settings = dict[str, object]
"""Flags of a run, by the name of their field."""

_FILES: Settings = {"load": "POLICY", "finetune": True, "train_data": "DATA", "reward_load": "REWARD"}
"""Files that a run needs and a plan does not have."""
_FP8: dict[str, Any] = {"fp8_format": "hybrid"}
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_LARGEST_MICRO_BATCH = 32
_OF_SOME_STAGES = (
    "samples_per_prompt",
    "prompts_per_round",
    "refresh_interval",
    "sampling_batch_size",
    "offload_prior",
    "offload_reward",
    "two_pass",
)
"""Fields of `Question` for those stages only that have a setting of the same name."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be run, and on what."""

    stage: str
    """Name of a stage that trains."""
    model: ResolvedModel
    """The model that trains, its sizes resolved."""
    machine: Machine
    gpus: int
    prompt_length: int
    response_length: int
    samples_per_prompt: int = 8
    """brain: responses of a group, n."""
    seq_length: int | None = None
    """sft: length of the sequences that records are packed into; None: that of one record, rounded up for FP8."""
    global_batch_size: int = 128
    prompts_per_round: int | None = None
    """brain: prompts of a round; None: those of one step."""
    refresh_interval: int | None = None
    """brain: steps of a round; None: one pass over the round."""
    sampling_batch_size: int | None = None
    """brain: responses decoded at one time; None: as many of a round as fit."""
    precision: Precision = "bf16"
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """auto: the least recomputation that fits."""
    shared_prefix: bool = True
    distributed_optimizer: bool = True
    offload_prior: bool = False
    offload_reward: bool = False
    two_pass: bool = False
    reward_model: ResolvedModel | None = None
    """brain: sizes of the reward model; None: the policy's."""
    reserved_bytes: int = 6 * GIB
    """Memory of a GPU that is left to the CUDA context, NCCL and fragmentation."""

    def __post_init__(self) -> None:
        if self.reserved_bytes < 0:
            raise ConfigError(f"reserved_bytes={self.reserved_bytes} is negative: a GPU has no more memory than it has")
        for name in _OF_SOME_STAGES:
            self._require_setting(name, setting=name)
        self._require_setting("reward_model", setting="reward_load")
        if self.reward_model is not None and self.reward_model.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"the reward model has vocab_size={self.reward_model.vocab_size}, the policy has "
                f"{self.model.vocab_size}: all models of a run share one tokenizer"
            )
        packs = _packs(self.stage)
        if self.seq_length is not None and not packs:
            raise ConfigError(
                f"seq_length={self.seq_length} packs records of --stage {_named(_packs)}, not {self.stage}: leave it "
                "out"
            )
        record = self.prompt_length + self.response_length
        if self.seq_length is not None and self.seq_length < record:
            raise ConfigError(
                f"seq_length={self.seq_length} holds no record of prompt_length={self.prompt_length} + response_length="
                f"{self.response_length}: use {record} or more"
            )
        if self.prompt_length == 0 and (not packs or self.seq_length not in (None, self.response_length)):
            raise ConfigError(
                "prompt_length=0 stands for sequences of which every token is predicted: use it with --stage "
                f"{_named(_packs)} and "
                "give their length as --response-length"
            )

    def _require_setting(self, name: str, *, setting: str) -> None:
        """Raise ConfigError where the question sets a field that the stage has no setting for."""
        if getattr(self, name) != getattr(type(self), name) and setting not in stage_fields(self.stage):
            readers = _named(lambda stage: setting in stage_fields(stage))
            raise ConfigError(f"{name}={getattr(self, name)} is for --stage {readers}, not {self.stage}: leave it out")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout that fits, and what it needs."""

    settings: Settings
    """Flags of the run."""
    workload: Workload
    layout: Layout
    phases: tuple[Memory, ...]
    """Memory of the ranks that can need most, phase by phase."""
    time: StepTime
    tokens_per_second: float
    """Tokens per second of one GPU; each prompt counts once."""

    @property
    def memory(self) -> Memory:
        """Memory of the phase that needs most."""
        return _peak(self.phases)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A layout that cannot be run, and why."""

    settings: Settings
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its numbers and its cure: the same for layouts that fail for the same reason."""
        return re.sub(r"\d+(\.\d+)?", "N", self.reason.split(": ")[0])


def search(question: Question) -> tuple[list[Plan], list[Rejection]]:
    """The candidates that fit, fastest first, and those that were rejected."""
    plans, rejections = [], []
    for settings in _candidates(question):
        try:
            plans.append(_plan(question, settings))
        except ConfigError as error:
            rejections.append(Rejection(settings=_without_files(settings), reason=str(error)))
    plans.sort(key=lambda plan: (-plan.tokens_per_second, plan.memory.total))
    return plans, rejections


def run_config(question: Question, settings: Settings) -> RunConfig:
    """The configuration of a run with these settings and the question's model.

    Raises:
        ConfigError: as a run would.
    """
    config = config_from_dict(question.stage, settings, "the plan")
    model = resolve(config.model, architecture(question.model), "the plan")
    config = dataclasses.replace(config, model=model)
    require(config)
    validate_layout(config, question.gpus, model)
    if question.reward_model is not None:
        try:
            of_reward = dataclasses.replace(config, model=question.reward_model)
            validate_layout(of_reward, question.gpus, question.reward_model)
        except ConfigError as error:
            raise ConfigError(f"reward model, {error}") from None
    return config


def _plan(question: Question, settings: Settings) -> Plan:
    """Estimate a candidate with the least recomputation and the most samples at one time that fit.

    Raises:
        ConfigError: it cannot be run, or does not fit.
    """
    config = run_config(question, settings)
    _check_nodes(question, config.parallel.tensor_model_parallel_size)
    scoring = {} if question.reward_model is None else {"reward": question.reward_model}
    workload, layout, phases = _that_fits(question, *from_run_config(config, question.gpus, scoring))
    time = step_time(workload, layout, question.machine)
    return Plan(
        settings=_without_files(settings) | _chosen(workload, layout),
        workload=workload,
        layout=layout,
        phases=phases,
        time=time,
        tokens_per_second=workload.step_tokens / time.total / question.gpus,
    )


def _check_nodes(question: Question, tensor: int) -> None:
    """Raise ConfigError where tensor-parallel ranks, which are neighbours, would not stay on one node."""
    node = question.machine.gpus_per_node
    if question.gpus > node and node % tensor:
        cure = ", ".join(map(str, _divisors(node, at_most=node)))
        raise ConfigError(f"tensor_model_parallel_size={tensor} crosses nodes of {node} GPUs: use one of {cure}")


def _that_fits(question: Question, workload: Workload, layout: Layout) -> tuple[Workload, Layout, tuple[Memory, ...]]:
    """The fastest variant that fits, and its memory.

    Raises:
        ConfigError: none does.
    """
    room = question.machine.memory_bytes - question.reserved_bytes
    *faster, least = _variants(question, workload, layout)
    phases = _phases(*least)
    needed = _peak(phases)
    if needed.total > room:
        raise ConfigError(
            f"memory on the busiest GPU exceeds what there is: {needed.total / GIB:.1f} GiB in {needed.phase} with "
            f"recompute={least[1].recompute}, {room / GIB:.1f} GiB are there"
        )
    for variant in faster:
        more = _phases(*variant)
        if _peak(more).total <= room:
            return *variant, more
    return *least, phases


def _phases(workload: Workload, layout: Layout) -> tuple[Memory, ...]:
    """Memory of the pipeline stages that can need most: the first has most micro-batches under way, the last the
    head."""
    ends = sorted({0, layout.pipeline - 1})
    return tuple(memory for one in ends for memory in pipeline_stage_memory(workload, layout, one))


def _peak(phases: tuple[Memory, ...]) -> Memory:
    return max(phases, key=lambda memory: memory.total)


def _variants(question: Question, workload: Workload, layout: Layout) -> Iterator[tuple[Workload, Layout]]:
    """The variants of a candidate, fastest first: first fewer samples at one time, then more recomputation."""
    choices = _RECOMPUTE if question.recompute == "auto" else (question.recompute,)
    for recompute in choices:
        for size in _sampling_batch_sizes(question, workload, layout):
            yield (
                dataclasses.replace(workload, sampling_batch_size=size),
                dataclasses.replace(layout, recompute=recompute),
            )


def _sampling_batch_sizes(question: Question, workload: Workload, layout: Layout) -> Iterator[int]:
    """All responses of a round on one replica, then half of the prompts, a quarter, and so on."""
    if question.sampling_batch_size is not None or not workload.generates:
        yield workload.sampling_batch_size
        return
    prompts = -(-workload.prompts_per_round // layout.data)
    while True:
        yield prompts * workload.samples_per_prompt
        if prompts == 1:
            return
        prompts = -(-prompts // 2)


def _chosen(workload: Workload, layout: Layout) -> Settings:
    """The flags of what was chosen from `_variants`."""
    recompute = {} if layout.recompute == "none" else {"recompute_granularity": layout.recompute}
    return recompute | ({"sampling_batch_size": workload.sampling_batch_size} if workload.generates else {})


def _without_files(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name not in _FILES}


def _candidates(question: Question) -> Iterator[Settings]:
    """Settings of every layout that fills the GPUs, the impossible ones too: they are rejected with a reason."""
    for tensor in _divisors(question.gpus, at_most=2 * question.machine.gpus_per_node):
        for pipeline in _divisors(question.gpus // tensor, at_most=question.model.num_layers):
            chunks = _chunk_layers(question.model.num_layers, pipeline)
            for layers, micro_batch in itertools.product(chunks, _micro_batches(question)):
                yield _settings(question, tensor, pipeline, layers, micro_batch)


def _chunk_layers(layers: int, pipeline: int) -> list[int | None]:
    """Possible numbers of layers of a chunk; None stands for the schedule that is not interleaved."""
    if pipeline == 1 or layers % pipeline:
        return [None]
    each = layers // pipeline
    return [None, *_divisors(each, at_most=each - 1)]


def _micro_batches(question: Question) -> list[int]:
    """Powers of two that divide the global batch."""
    sizes = (2**power for power in range(_LARGEST_MICRO_BATCH.bit_length()))
    return [size for size in sizes if question.global_batch_size % size == 0]


def _divisors(number: int, *, at_most: int) -> list[int]:
    return [value for value in range(1, min(number, at_most) + 1) if number % value == 0]


def _settings(question: Question, tensor: int, pipeline: int, layers: int | None, micro_batch: int) -> Settings:
    replicas, fields = question.gpus // (tensor * pipeline), stage_fields(question.stage)
    settings: Settings = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "micro_batch_size": micro_batch,
        "global_batch_size": question.global_batch_size,
        "shared_prefix": question.shared_prefix,
        "seq_length": _seq_length(question, tensor),
        **{name: value for name, value in _FILES.items() if name in fields},
        **_settings_of_stage(question),
    }
    if question.prompt_length:
        settings["max_prompt_length"] = question.prompt_length
        if "max_new_tokens" not in fields:
            settings["max_response_length"] = question.response_length
    if layers is not None:
        settings["num_layers_per_virtual_pipeline_stage"] = layers
    if tensor > 1:
        settings["sequence_parallel"] = True
    if question.precision != "fp32":
        settings["bf16"] = True
    if question.precision == "fp8":
        settings |= {**_FP8, "transformer_impl": "transformer_engine"}
    if replicas > 1:
        settings["overlap_grad_reduce"] = True
    if replicas > 1 and question.distributed_optimizer:
        settings |= {"use_distributed_optimizer": True, "overlap_param_gather": True}
    return settings


def _seq_length(question: Question, tensor: int) -> int:
    """The length that was asked for, or the longest record, rounded up for FP8 and sequence parallelism."""
    longest, unit = question.prompt_length + question.response_length, tensor
    if question.precision == "fp8":
        unit *= Fp8Config(**_FP8).sequence_multiple
    return question.seq_length or -(-longest // unit) * unit


def _settings_of_stage(question: Question) -> Settings:
    """Fields of the question that only some stages have, under the names of their settings."""
    asked = {name: getattr(question, name) for name in _OF_SOME_STAGES}
    asked["prompts_per_round"] = question.prompts_per_round or question.global_batch_size
    asked["max_new_tokens"] = question.response_length
    fields = stage_fields(question.stage)
    return {name: value for name, value in asked.items() if name in fields and value is not None}


def training_stages() -> list[str]:
    """Names of the stages that can be planned."""
    return [name for name, spec in stages().items() if spec.trains]


def _packs(stage: str) -> bool:
    """Whether a stage packs records by default."""
    return stage_spec(stage).work(config_from_dict(stage, {})).packed


def _named(has: Callable[[str], bool]) -> str:
    """The names of the stages that can be planned and satisfy `has`, in words."""
    return " or ".join(filter(has, training_stages()))
