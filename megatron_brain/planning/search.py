"""Looks for layouts: each candidate is the configuration of a run, checked as a run checks it, and then estimated."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_brain.config.checks import require, validate_layout
from megatron_brain.config.fields import stage_fields
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.loader import config_from_dict
from megatron_brain.config.run import RunConfig
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import architecture, resolve
from megatron_brain.planning.machine import GIB
from megatron_brain.planning.memory import Memory, pipeline_stage_memory
from megatron_brain.planning.question import OF_SOME_STAGES, Question
from megatron_brain.planning.rounds import step_time, time_without_drawing
from megatron_brain.planning.servers import (
    Servers,
    at_one_time,
    drawing_seconds,
    fastest_servers,
    fewest_servers,
    sync_seconds,
)
from megatron_brain.planning.time import StepTime
from megatron_brain.planning.workload import Layout, Recompute, Workload, from_run_config

Settings = dict[str, object]
"""Flags of a run, by the name of their field."""

_FILES: Settings = {"load": "POLICY", "finetune": True, "train_data": "DATA", "reward_load": "REWARD"}
"""Files that a run needs and a plan does not have."""
_SERVERS: Settings = {"engine_url": "http://SERVERS", "engine_sync_dir": "SYNC_DIR"}
"""The same of a run whose responses servers draw."""
_FP8: dict[str, Any] = {"fp8_format": "hybrid"}
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_LARGEST_MICRO_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Servers that draw the responses of a layout, and their times, in seconds of a round."""

    servers: Servers
    at_one_time: int
    """Responses that a server draws at one time."""
    drawing: float
    write: float
    """Writing the weights to shared storage."""
    read: float
    """Reading them."""
    training: float
    """Scoring the round and training on it, during which rounds ahead are drawn."""
    enough: Servers | None
    """The servers on the fewest GPUs that draw no longer than that; None: no number of them does."""


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
    """Tokens per second of one GPU, those of servers included; each prompt counts once."""
    engine: EnginePlan | None
    """The servers that draw the responses; None: the GPUs that train draw, or nothing does."""

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
    plans: list[Plan] = []
    rejections: list[Rejection] = []
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
    engine = None if question.engine_gpus is None else _engine(question, workload, layout)
    time = step_time(workload, layout, question.machine, None if engine is None else engine.servers)
    gpus = question.gpus + (engine.servers.gpus if engine else 0)
    return Plan(
        settings=_without_files(settings) | _chosen(workload, layout, engine),
        workload=workload,
        layout=layout,
        phases=phases,
        time=time,
        tokens_per_second=workload.step_tokens / time.total / gpus,
        engine=engine,
    )


def _engine(question: Question, workload: Workload, layout: Layout) -> EnginePlan:
    """The servers that draw for a layout.

    Raises:
        ConfigError: there are none that can.
    """
    machine, tensor = question.machine, question.engine_tensor_parallel
    training = workload.steps_per_round * time_without_drawing(workload, layout, machine).total
    enough = fewest_servers(workload, machine, seconds=training, tensor=tensor)
    if question.engine_gpus == "auto":
        if enough is None:
            raise ConfigError("no number of servers draws a round as fast as it is trained on: give engine_gpus")
        servers = enough
    else:
        assert question.engine_gpus is not None
        servers = fastest_servers(workload, machine, gpus=question.engine_gpus, tensor=tensor)
    write, read = sync_seconds(workload, layout, servers, machine)
    return EnginePlan(
        servers=servers,
        at_one_time=at_one_time(workload, servers, machine),
        drawing=drawing_seconds(workload, servers, machine),
        write=write,
        read=read,
        training=training,
        enough=enough,
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
    if question.sampling_batch_size is not None or not workload.draws_on_its_gpus:
        yield workload.sampling_batch_size
        return
    prompts = -(-workload.prompts_per_round // layout.data)
    while True:
        yield prompts * workload.samples_per_prompt
        if prompts == 1:
            return
        prompts = -(-prompts // 2)


def _chosen(workload: Workload, layout: Layout, engine: EnginePlan | None) -> Settings:
    """The flags of what was chosen from `_variants`, and of how the servers are used."""
    settings: Settings = {} if layout.recompute == "none" else {"recompute_granularity": layout.recompute}
    if workload.draws_on_its_gpus:
        settings["sampling_batch_size"] = workload.sampling_batch_size
    if engine is not None:
        settings["engine_concurrency"] = engine.at_one_time
    return settings


def _without_files(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name not in _FILES | _SERVERS}


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
    if question.engine_gpus is not None:
        settings |= {"engine": "vllm", **_SERVERS}
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
    asked = {name: getattr(question, name) for name in OF_SOME_STAGES}
    asked["prompts_per_round"] = question.prompts_per_round or question.global_batch_size
    asked["max_new_tokens"] = question.response_length
    fields = stage_fields(question.stage)
    return {name: value for name, value in asked.items() if name in fields and value is not None}
