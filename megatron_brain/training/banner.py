"""The banner: a run prints it once, when its model is built and its data are read."""

import platform
from collections.abc import Sequence

import megatron.core
import torch

import megatron_brain
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.planning.sizes import total_parameters
from megatron_brain.planning.summary import Row, fullest_rank, global_batch, learning_rate, section, sizes
from megatron_brain.planning.workload import Layout, Workload, from_run_config
from megatron_brain.runtime import transformer_engine
from megatron_brain.runtime.parallel import device_name
from megatron_brain.training.run import Run


def show_banner(run: Run, rows: Sequence[Row]) -> None:
    """Print the banner on the reporting rank. `rows` come from the stage: the run's length and the models it uses."""
    if run.parallel.is_writer:
        print(banner(run, rows), flush=True)


def banner(run: Run, rows: Sequence[Row]) -> str:
    """Versions, device, layout, sizes, data, and where files go. Each line has a name and a value."""
    config, spec = run.config, spec_of(run.config)
    workload, layout = from_run_config(config, run.parallel.world_size)
    read = [(flag.replace("_", " "), corpus.summary) for flag, corpus in run.corpora.items()]
    return section(
        f"{config.stage} with megatron_brain {megatron_brain.__version__}",
        [
            ("versions", _versions()),
            *_device(run),
            ("precision", _precision(workload, config)),
            ("processes", "; ".join([f"{layout.world_size} = {sizes(layout)}", *_options(layout)])),
            *_model(run, workload, layout),
            *read,
            *(global_batch(config, workload, layout) if spec.trains else []),
            *rows,
            *([("learning rate", learning_rate(config))] if spec.trains else []),
            ("seed", str(config.training.seed)),
            *(_files(config) if spec.trains else []),
            *((output.flag.removeprefix("--"), output.place) for output in spec.outputs(config) if output.place),
        ],
    )


def _versions() -> str:
    problem = transformer_engine.problem()
    engine = f"transformer-engine {transformer_engine.version()}" if problem is None else "no transformer-engine"
    core = f"megatron-core {megatron.core.__version__}"
    return f"python {platform.python_version()}, torch {torch.__version__}, {core}, {engine}"


def _device(run: Run) -> list[Row]:
    """The reporting rank's device, and what computes the layers there."""
    layers, device = run.resolved.layers, run.parallel.device
    rows = [("device", device_name(device)), ("layers", f"{layers.impl} ({layers.reason})")]
    if spec_of(run.config).trains:
        fused = "on" if layers.gradient_accumulation_fusion else "off"
        rows.append(("gradient fusion", f"{fused} ({layers.fusion_reason})"))
    return rows


def _precision(workload: Workload, config: RunConfig) -> str:
    fp8 = config.fp8
    if fp8.fp8_format is None:
        return "bf16" if config.model.bf16 else "float32"
    start, end = workload.bf16_layers
    parts = [f"FP8 {fp8.fp8_format}", f"recipe {fp8.fp8_recipe}"]
    parts += ["emulated"] if fp8.fp8_emulate else []
    parts += [f"the first {start} and last {end} layers in bf16"] if start or end else []
    return ", ".join(parts)


def _options(layout: Layout) -> list[str]:
    """The options of the layout that are on, in words."""
    named = {
        "sequence parallel": layout.sequence_parallel,
        f"interleaved, {layout.virtual_pipeline} chunks on a pipeline stage": layout.virtual_pipeline > 1,
        "distributed optimizer": layout.distributed_optimizer,
        f"{layout.recompute} recomputation": layout.recompute != "none",
    }
    return [name for name, on in named.items() if on]


def _model(run: Run, workload: Workload, layout: Layout) -> list[Row]:
    total = f"{total_parameters(workload.model, workload.head):,} with the {workload.head} head"
    fullest = f"{fullest_rank(workload, layout):,} on the fullest rank, padding of the vocabulary included"
    return [("parameters", f"{total}; {fullest}"), ("weights", _origin(run))]


def _origin(run: Run) -> str:
    """Where the weights come from."""
    if run.start_from is None:
        return run.config.model.hf_model or "random"
    how = ", resumed with its optimizer and position" if run.resuming else ""
    return f"{run.start_from.path}{how}"


def _files(config: RunConfig) -> list[Row]:
    save, interval = config.checkpoint.save, config.checkpoint.save_interval
    when = f"every {interval} steps and after the last" if interval else "after the last step"
    folder = config.logging.tensorboard_dir or save
    files = "metrics.jsonl, TensorBoard events, config.yaml"
    return [
        ("checkpoints", f"{save}, {when}" if save else "none: --save is not set"),
        ("metrics", f"{folder}: {files}" if folder else "nowhere else: neither --save nor --tensorboard-dir is set"),
    ]
