"""The tables of docs/scaling.md, made by the planner.

    PYTHONPATH=tools python -m planner_study.scaling docs/scaling.md

rewrites the tables between the markers of the file. A test compares one of them with the planner.
"""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_brain.errors import ConfigError
from megatron_brain.planning.machine import MACHINES
from megatron_brain.planning.presets import preset
from megatron_brain.planning.question import Question
from megatron_brain.planning.report import layout_name
from megatron_brain.planning.search import Plan, search

_PROMPT, _RESPONSE, _SAMPLES = 512, 128, 16
_STRONG_GROUPS = 512


@functools.cache
def fastest(model: str, gpus: int, groups: int, **question: object) -> Plan:
    """The fastest layout of a BRAIn step of `groups` groups on `gpus` H100.

    Raises:
        ConfigError: no layout fits.
    """
    lengths = {"prompt_length": _PROMPT, "response_length": _RESPONSE, "samples_per_prompt": _SAMPLES}
    plans, rejections = search(
        Question(
            stage="brain",
            model=preset(model),
            machine=MACHINES["h100"],
            gpus=gpus,
            global_batch_size=groups,
            **lengths | question,
        )
    )
    if not plans:
        raise ConfigError(f"{model} on {gpus} GPUs: none of {len(rejections)} layouts fits")
    return plans[0]


def weak_scaling() -> str:
    """Table of the cost of a step that grows with the cluster: two groups for each GPU."""
    runs = [("llama3-8b", gpus) for gpus in (8, 64, 512, 4096)] + [("llama3-70b", gpus) for gpus in (64, 512, 4096)]
    rows = [_cost_row(f"{model} on {gpus:,}", fastest(model, gpus, 2 * gpus)) for model, gpus in runs]
    return _table(("model, GPUs", *_COST_COLUMNS), rows)


def strong_scaling() -> str:
    """Table of the cost of a step with the same number of groups on more and more GPUs."""
    rows = []
    for gpus in (8, 64, 512, 1024, 2048, 4096):
        plan = fastest("llama3-8b", gpus, _STRONG_GROUPS)
        per_replica = _STRONG_GROUPS / plan.layout.data
        rows.append([*_cost_row(f"{gpus:,}", plan), f"{per_replica:g}"])
    return _table(("GPUs", *_COST_COLUMNS, "groups a replica"), rows)


def samples_per_prompt() -> str:
    """Table of the cost of a group for growing n, with the prompt computed once, and computed for every response."""
    rows = []
    for n in (2, 4, 8, 16, 32, 64):
        shared = fastest("llama3-8b", 64, 128, samples_per_prompt=n)
        copies = fastest("llama3-8b", 64, 128, samples_per_prompt=n, shared_prefix=False)
        seconds = _gpu_seconds(shared)
        rows.append(
            [
                str(n),
                f"{seconds:.2f}",
                f"{seconds / n:.3f}",
                f"{_share(shared, 'sampling'):.0%}",
                f"{_share(shared, 'scoring'):.0%}",
                f"{_gpu_seconds(copies) / seconds:.2f}",
            ]
        )
    head = ("n", "GPU-seconds a group", "a response", "sampling", "scoring", "without shared prefix")
    return _table(head, rows)


def shared_prefix() -> str:
    """Table of how much longer scoring and update take where the prompt is computed for every response."""
    lengths = [(64, 512), (128, 128), (512, 128), (2048, 128)]
    rows = []
    for prompt, response in lengths:
        cells = []
        for n in (2, 8, 32):
            question = {"prompt_length": prompt, "response_length": response, "samples_per_prompt": n}
            shared = fastest("llama3-8b", 64, 128, **question)
            copies = fastest("llama3-8b", 64, 128, shared_prefix=False, **question)
            tokens = n * (prompt + response) / (prompt + n * response)
            cells.append(f"{tokens:.2f} / {_without_sampling(copies) / _without_sampling(shared):.2f}")
        rows.append([f"{prompt} + {response}", *cells])
    return _table(("prompt + response", "n = 2", "n = 8", "n = 32"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "weak": weak_scaling,
    "strong": strong_scaling,
    "samples": samples_per_prompt,
    "prefix": shared_prefix,
}
"""The tables by the name in the page's markers."""


def replace_tables(text: str) -> str:
    """The text of the page with its tables replaced.

    Raises:
        ConfigError: the page lacks a marker.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ConfigError(f"markers {begin!r} and {end!r} are missing")
        text = pattern.sub(f"{begin}\n{table()}\n{end}", text)
    return text


_COST_COLUMNS = ("layout", "sampling s", "scoring s", "update s", "GPU-seconds a group", "tokens/s/GPU")


def _cost_row(name: str, plan: Plan) -> list[str]:
    time = plan.time
    update = time.total - time.sampling - time.scoring
    return [
        name,
        layout_name(plan.layout),
        f"{time.sampling:.2f}",
        f"{time.scoring:.2f}",
        f"{update:.2f}",
        f"{_gpu_seconds(plan):.2f}",
        f"{plan.tokens_per_second:,.0f}",
    ]


def _gpu_seconds(plan: Plan) -> float:
    """GPU seconds of one group, from its sampling to its update."""
    return plan.time.total * plan.layout.world_size / plan.workload.global_batch_size


def _share(plan: Plan, part: str) -> float:
    return getattr(plan.time, part) / plan.time.total


def _without_sampling(plan: Plan) -> float:
    return plan.time.total - plan.time.sampling


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(replace_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
