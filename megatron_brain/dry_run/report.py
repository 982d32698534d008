"""The report of `--dry-run` as text: titles, and under each one lines of a name and a value."""

import math

from megatron_brain.config.fields import stage_fields
from megatron_brain.config.fp8_checks import validate_fp8_device
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.dry_run.engine import engine_rows
from megatron_brain.dry_run.inspect import Findings
from megatron_brain.dry_run.nodes import gpus_per_node
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import ARCHITECTURE_FIELDS
from megatron_brain.planning.machine import GIB, MACHINES
from megatron_brain.planning.memory import PARTS, estimate_memory
from megatron_brain.planning.sizes import total_parameters
from megatron_brain.planning.summary import (
    Row,
    fullest_rank,
    gib,
    global_batch,
    learning_rate,
    section,
    sizes,
)
from megatron_brain.planning.workload import Layout, Workload, from_run_config

Rows = list[Row]

_H100 = (9, 0)
"""Compute capability of the H100. A dry run looks at no device and assumes an H100, for memory too."""


def render(found: Findings) -> str:
    """The whole report."""
    config, world_size = found.config, found.resolved.world_size
    sizes = {name: scoring.model for name, scoring in found.scoring.items()}
    workload, layout = from_run_config(config, world_size, sizes)
    trains = spec_of(config).trains
    sections: list[tuple[str, Rows]] = [
        (f"{config.stage} on {world_size} processes: dry run, nothing was started", []),
        ("Settings that differ from the defaults", _settings(config)),
        ("Model", _model(workload, layout)),
        ("Layout", _layout(layout)),
        ("Batch", _batch(config, workload, layout) if trains else _answers(workload, layout)),
        *([("Engine", engine_rows(config, workload, layout))] if workload.generates else []),
        ("Memory per GPU, on the fullest (estimate)", _memory(config, workload, layout)),
        ("Schedule", _schedule(found) if trains else _prompts(found)),
        ("FP8", _fp8(config, workload)),
        ("Checked", [("", line) for line in found.search.checked]),
        ("Not looked at, not on this machine", [("", line) for line in found.search.absent]),
    ]
    return "\n".join(section(title, rows) for title, rows in sections)


def _settings(config: RunConfig) -> Rows:
    """All settings that are not defaults, except the sizes, which the model's section shows."""
    rows = []
    for name, spec in stage_fields(config.stage).items():
        value = getattr(config.section(spec.section), name)
        if value != spec.default and name not in ARCHITECTURE_FIELDS and name != "dry_run":
            rows.append((name, _text(value)))
    return rows


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _model(workload: Workload, layout: Layout) -> Rows:
    model = workload.model
    known = {name: getattr(model, name) for name in ARCHITECTURE_FIELDS if getattr(model, name) is not None}
    return [
        *((name, _text(value)) for name, value in known.items()),
        ("parameters", f"{total_parameters(model, workload.head):,} with the {workload.head} head"),
        ("parameters per GPU", f"{fullest_rank(workload, layout):,} on the fullest"),
    ]


def _layout(layout: Layout) -> Rows:
    """The parallel sizes, and the ranks of the first groups in megatron-core's order: tensor, data, pipeline."""
    tensor, data = layout.tensor, layout.data
    rows = [
        ("world", f"{layout.world_size} = {sizes(layout)}"),
        ("sequence parallel", "yes" if layout.sequence_parallel else "no"),
        (
            "chunks of a pipeline stage",
            f"{layout.virtual_pipeline}, {'not ' if layout.virtual_pipeline == 1 else ''}interleaved",
        ),
        ("first tensor group", _ranks(range(tensor))),
        ("first data group", _ranks(range(0, tensor * data, tensor))),
        ("first pipeline group", _ranks(range(0, layout.world_size, tensor * data))),
    ]
    gpus = gpus_per_node(layout.world_size)
    groups = [_ranks(range(start, min(start + tensor, gpus))) for start in range(0, gpus, tensor)]
    shared = "; ".join(groups) if tensor > 1 else "none"
    rows.append(("GPUs that share a layer", f"{shared} of the {gpus} of a node"))
    if gpus % tensor:
        rows.append(
            ("warning", f"tensor-parallel groups of {tensor} do not stay on nodes of {gpus} GPUs, where NVLink ends")
        )
    return rows


def _ranks(ranks: range) -> str:
    shown = [str(rank) for rank in ranks]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:7], "...", shown[-1]])


def _batch(config: RunConfig, workload: Workload, layout: Layout) -> Rows:
    unit, batch = spec_of(config).work(config).unit, workload.global_batch_size
    rows = global_batch(config, workload, layout)
    if layout.max_tokens_per_micro_batch is None:
        rows.append(("per replica and step", f"{batch // layout.data} {unit}"))
    else:
        rows.append(
            ("micro-batches", f"about {layout.num_micro_batches} per replica, were all {unit} as long as allowed")
        )
    each = workload.sample_tokens
    rows.append(("tokens of a step", f"at most {batch * each:,}: {batch} {unit} of at most {each:,}"))
    if spec_of(config).rounds:
        rows += _round(config, workload, layout)
    rows.append(("pipeline bubble", _bubble(layout)))
    return rows


def _round(config: RunConfig, workload: Workload, layout: Layout) -> Rows:
    n, prompts = workload.samples_per_prompt, workload.prompts_per_round
    if spec_of(config).sources(config)[0].holds == "rollouts":
        return [("round", "one rollout file")]
    rows = [
        ("responses of a group", str(n)),
        ("round", f"{prompts} groups, {prompts * n} responses, {workload.steps_per_round} steps"),
    ]
    if workload.samples_responses:
        drawn = workload.drawn_per_prompt
        mine = math.ceil(prompts / layout.data) * drawn
        at_once = "" if workload.drawn_by_servers else f", at most {workload.sampling_batch_size} at one time"
        rows += [
            ("sampled on a replica", f"{mine} responses a round{at_once}"),
            ("tokens sampled a round", f"at most {prompts * drawn * workload.response_length:,}"),
        ]
    return rows


def _bubble(layout: Layout) -> str:
    """Share of a step in which a pipeline stage waits (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)."""
    waits = layout.pipeline - 1
    if not waits:
        return "none"
    work = layout.num_micro_batches * layout.virtual_pipeline
    return f"{waits / (work + waits):.1%} of a step: {waits} of {work} + {waits} slots"


def _answers(workload: Workload, layout: Layout) -> Rows:
    responses = ("responses of a prompt", str(workload.samples_per_prompt))
    if workload.drawn_by_servers:
        return [responses]
    return [
        responses,
        ("decoded at one time", f"at most {workload.sampling_batch_size} responses on each of {layout.data} replicas"),
    ]


def _memory(config: RunConfig, workload: Workload, layout: Layout) -> Rows:
    # Unless the local layers are asked for, a start on a GPU uses Transformer Engine.
    impl = "local" if config.model.transformer_impl == "local" else "transformer_engine"
    memory, there = estimate_memory(workload, layout, impl=impl), MACHINES["h100"].memory_bytes
    parts = {name: getattr(memory, name) for name in PARTS}
    rows = [(name.replace("_", " "), gib(size)) for name, size in parts.items() if size]
    rows += [
        ("total", f"{gib(memory.total)} of the {there / GIB:.0f} GiB of an H100"),
        ("at its most", f"in {memory.phase}, on pipeline stage {memory.pipeline_stage}"),
        ("not counted", "the CUDA context, NCCL's buffers, fragmentation"),
    ]
    if memory.total > there:
        rows.append(("warning", "this does not fit an H100"))
    return rows


def _schedule(found: Findings) -> Rows:
    config = found.config
    checkpoint, optimizer, total = config.checkpoint, config.optimizer, found.length.train_iters
    rows = [
        ("iterations", _iterations(found)),
        ("learning rate", learning_rate(config)),
        ("warm-up", f"{optimizer.lr_warmup_iters} iterations"),
        ("decay", f"over {optimizer.lr_decay_iters or total or 'all'} iterations"),
        ("saves", _every(checkpoint.save_interval, total) if checkpoint.save else "none: --save is not set"),
    ]
    if checkpoint.keep_best is not None:
        rows.append(("also saved", f"after validations that improve {checkpoint.keep_best}; the best is kept"))
    if spec_of(config).rounds and total is not None and found.length.steps_per_round is not None:
        rows.append(("rounds", str(math.ceil(total / found.length.steps_per_round))))
    interval = config.training.eval_interval
    rows.append(("validations", _every(interval, total, before=1) if config.data.valid_data else "none"))
    if spec_of(config).work(config).answers_held_out:
        rows.append(("of a validation", _held_out(found)))
    if config.posterior.posterior_samples:
        rows.append(("of the first validation", _prior_samples(config)))
    if config.brain.stop_at_kl is not None:
        rows.append(("ends early", f"where the held-out KL to the prior exceeds {config.brain.stop_at_kl:g} nats"))
    if found.resolved.start.resuming:
        rows.append(("goes on after", f"iteration {found.resolved.start.checkpoint.iteration}"))
    return rows


def _held_out(found: Findings) -> str:
    """What a validation of a stage that draws answers makes."""
    sampling, count = found.config.sampling, found.num_valid
    prompts = "held-out prompts, how many is not known here" if count is None else f"{count:,} held-out prompts"
    plain = (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    each = "2 answers each" if plain else "3 answers each, one of them for the KL"
    return f"{prompts}: {each}, and at the first one 2 of the prior, of at most {sampling.max_new_tokens} tokens"


def _prior_samples(config: RunConfig) -> str:
    """The samples of the prior by which the distance to the posterior is measured."""
    settings = config.posterior
    prompts = "all" if settings.posterior_prompts is None else f"the first {settings.posterior_prompts:,}"
    where = "" if settings.posterior_data is None else f", in {settings.posterior_data}"
    return f"{settings.posterior_samples} samples of the prior for each of {prompts} prompts, scored once{where}"


def _iterations(found: Findings) -> str:
    """Number of steps of the run, and how it is known."""
    training, length = found.config.training, found.length
    total = length.train_iters
    epochs = f"{training.train_epochs or 1.0:g} epoch{'' if (training.train_epochs or 1.0) == 1 else 's'}"
    if training.train_iters is not None:
        return f"{total}: --train-iters"
    if total is None:
        return f"not known: {epochs} of records that are not known here"
    if length.num_rounds is None:
        return f"{total}: {epochs} of {found.num_samples} samples"
    return f"{total}: {length.num_rounds} rounds of {length.steps_per_round} steps"


def _every(interval: int | None, total: int | None, *, before: int = 0) -> str:
    """When and how often something is done: at intervals, after the last step, and `before` times before the first."""
    when = f"every {interval} iterations and after the last" if interval else "after the last iteration"
    if before:
        when += ", and before the first"
    if total is None:
        return when
    return f"{when}: {(math.ceil(total / interval) if interval else 1) + before}"


def _prompts(found: Findings) -> Rows:
    config, count = found.config, found.num_samples
    rows = [("prompts", "not known: not on this machine" if count is None else str(count))]
    return [*rows, ("posterior", _prior_samples(config))] if config.posterior.posterior_samples else rows


def _fp8(config: RunConfig, workload: Workload) -> Rows:
    fp8, (start, end) = config.fp8, workload.bf16_layers
    if fp8.fp8_format is None:
        return [("format", "none: no FP8")]
    rows = [
        ("format", fp8.fp8_format + (", emulated" if fp8.fp8_emulate else "")),
        ("recipe", fp8.fp8_recipe),
        (
            "layers in bf16",
            f"the first {start} and the last {end} of {config.model.num_layers}" if start or end else "none",
        ),
        ("weights in FP8 alone", "yes" if fp8.fp8_param_gather else "no"),
    ]
    try:
        validate_fp8_device(fp8, _H100)
    except ConfigError as error:
        rows.append(("warning", f"not on an H100: {error}"))
    return rows
