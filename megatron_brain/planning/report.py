"""What `search` found, as tables, as JSON and as the flags of a run."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.table import Table

from megatron_brain.config.fields import all_fields
from megatron_brain.planning.machine import GIB
from megatron_brain.planning.memory import PARTS
from megatron_brain.planning.question import Question
from megatron_brain.planning.search import EnginePlan, Plan, Rejection, Settings
from megatron_brain.planning.servers import Servers
from megatron_brain.planning.time import StepTime
from megatron_brain.planning.workload import Layout

FORMAT = 2
"""Version of the JSON report. It is raised when a key changes its meaning or is removed."""

TIMES = tuple(field.name for field in fields(StepTime))
_LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "data", "micro_batch_size", "num_micro_batches", "recompute")
_HEADINGS = {
    "logprob_workspace": "log-probs",
    "kv_cache": "KV cache",
    "frozen_models": "frozen",
    "tensor_communication": "TP comm",
    "pipeline_communication": "PP comm",
    "data_communication": "DP comm",
}


def memory_table(plans: Sequence[Plan], question: Question) -> Table:
    """GiB on the busiest GPU. Each part is shown at its largest; not all exist at one time, so the total is not their
    sum."""
    there = (question.machine.memory_bytes - question.reserved_bytes) / GIB
    names = [name for name in PARTS if any(_largest(plan)[name] for plan in plans)]
    table = Table(title=f"Memory of the busiest GPU, GiB of {there:.0f}; parts at their largest, total of one phase")
    for heading in ("", "layout", "recompute", *map(_heading, names), "total", "in"):
        table.add_column(heading, justify="left" if heading in ("layout", "recompute", "in") else "right", no_wrap=True)
    for place, plan in enumerate(plans, 1):
        largest, peak = _largest(plan), plan.memory
        parts = (f"{largest[name] / GIB:.1f}" for name in names)
        table.add_row(
            str(place), layout_name(plan.layout), plan.layout.recompute, *parts, f"{peak.total / GIB:.1f}", peak.phase
        )
    return table


def time_table(plans: Sequence[Plan]) -> Table:
    """Seconds of an optimizer step by part, and throughput."""
    names = [name for name in TIMES if any(getattr(plan.time, name) for plan in plans)]
    table = Table(title="Seconds of an optimizer step; tokens count each prompt once")
    for heading in ("", "layout", *map(_heading, names), "total", "tokens/s/GPU"):
        table.add_column(heading, justify="left" if heading == "layout" else "right", no_wrap=True)
    for place, plan in enumerate(plans, 1):
        parts = (f"{getattr(plan.time, name):.2f}" for name in names)
        table.add_row(
            str(place), layout_name(plan.layout), *parts, f"{plan.time.total:.2f}", f"{plan.tokens_per_second:,.0f}"
        )
    return table


def engine_table(plans: Sequence[Plan]) -> Table:
    """Seconds of a round: what the servers of each layout do, and what the GPUs that train do in the meantime."""
    table = Table(title="Servers; seconds of a round")
    headings = ("servers", "at one time", "sampling", "score + train", "sync: write", "read", "as fast as training")
    for heading in ("", "layout", *headings):
        left = heading in ("layout", "servers", "as fast as training")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for place, plan in enumerate(plans, 1):
        engine = plan.engine
        assert engine is not None
        seconds = (f"{value:.2f}" for value in (engine.drawing, engine.training, engine.write, engine.read))
        enough = "no number of servers" if engine.enough is None else servers_name(engine.enough)
        at_once = f"{engine.at_one_time:,}"
        table.add_row(str(place), layout_name(plan.layout), servers_name(engine.servers), at_once, *seconds, enough)
    return table


def servers_name(servers: Servers) -> str:
    """GPUs of servers, and how many have which tensor-parallel size."""
    return f"{servers.gpus} GPUs: {servers.count} x TP{servers.tensor}"


def rejection_table(rejections: Sequence[Rejection]) -> Table:
    """The reasons of rejections: how many layouts each has, and an example."""
    kinds = defaultdict(list)
    for rejection in rejections:
        kinds[rejection.kind].append(rejection)
    table = Table(title="Rejected", show_lines=True)
    table.add_column("layouts", justify="right")
    table.add_column("for example, and why")
    for found in sorted(kinds.values(), key=len, reverse=True):
        table.add_row(str(len(found)), f"{_short(found[0].settings)}: {found[0].reason}")
    return table


def flags(settings: Settings) -> list[str]:
    """The settings as flags of `python -m megatron_brain`, without those that have their defaults."""
    found = []
    for name, value in settings.items():
        spec = all_fields()[name]
        if value == spec.default:
            continue
        if isinstance(value, bool):
            found.append(spec.flag if value else spec.flag.replace("--", "--no-", 1))
        else:
            found += [spec.flag, str(value)]
    return found


def as_json(
    question: Question,
    name: str,
    plans: Sequence[Plan],
    rejections: Sequence[Rejection],
    *,
    reward_model: str | None = None,
) -> dict[str, Any]:
    """The whole answer: every plan and every rejection. Sizes are in bytes, times in seconds.

    Args:
        name: name of the model, as it was asked for.
        reward_model: name of the reward model; None: it has the policy's sizes.
    """
    asked = {key: value for key, value in vars(question).items() if key not in ("model", "machine", "reward_model")}
    return {
        "format": FORMAT,
        "question": {"model": name, "reward_model": reward_model, **asked},
        "machine": asdict(question.machine),
        "layouts": [_plan_as_dict(plan) for plan in plans],
        "rejected": [
            {"kind": rejection.kind, "reason": rejection.reason, "settings": rejection.settings}
            for rejection in rejections
        ],
    }


def _plan_as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "layout": {name: getattr(plan.layout, name) for name in _LAYOUT},
        "micro_batch_tokens": plan.workload.micro_batch_tokens(plan.layout),
        "sampling_batch_size": plan.workload.sampling_batch_size if plan.workload.draws_on_its_gpus else None,
        "memory": {"largest": _largest(plan), "peak": plan.memory.as_dict()},
        "seconds": {name: getattr(plan.time, name) for name in TIMES} | {"total": plan.time.total},
        "tokens_per_second_per_gpu": plan.tokens_per_second,
        "engine": None if plan.engine is None else _engine_as_dict(plan.engine),
        "flags": flags(plan.settings),
    }


def _engine_as_dict(engine: EnginePlan) -> dict[str, Any]:
    return {
        "servers": asdict(engine.servers),
        "gpus": engine.servers.gpus,
        "at_one_time": engine.at_one_time,
        "seconds_of_a_round": {name: getattr(engine, name) for name in ("drawing", "write", "read", "training")},
        "as_fast_as_training": None if engine.enough is None else asdict(engine.enough),
    }


def layout_name(layout: Layout) -> str:
    """Sizes of a layout in a few letters."""
    chunks = f" VPP{layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""
    return f"TP{layout.tensor} PP{layout.pipeline}{chunks} DP{layout.data} MBS{layout.micro_batch_size}"


def _largest(plan: Plan) -> dict[str, int]:
    """Each part in the phase and on the pipeline stage where it is largest."""
    return {name: max(getattr(memory, name) for memory in plan.phases) for name in PARTS}


def _short(settings: Settings) -> str:
    chunk = settings.get("num_layers_per_virtual_pipeline_stage")
    interleaved = f" ({chunk} layers a chunk)" if chunk else ""
    return (
        f"TP{settings['tensor_model_parallel_size']} PP{settings['pipeline_model_parallel_size']}{interleaved} "
        f"MBS{settings['micro_batch_size']}"
    )


def _heading(name: str) -> str:
    return _HEADINGS.get(name, name)
