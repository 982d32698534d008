"""What a run computes and where, in words: for the report of a dry run and for the banner of a start."""

import textwrap
from collections.abc import Sequence

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.planning.machine import GIB
from megatron_brain.planning.sizes import pipeline_stage_parameters
from megatron_brain.planning.workload import Layout, Workload

Row = tuple[str, str]
"""A name and a value; an empty name makes the value an item of a list."""

_WIDTH = 118


def section(title: str, rows: Sequence[Row]) -> str:
    """A title, and under it the rows with their values aligned and wrapped."""
    lines = [title]
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        start = f"  {label:<{width}}  " if label else "  - "
        lines += textwrap.wrap(
            value,
            _WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines) + "\n"


def fullest_rank(workload: Workload, layout: Layout) -> int:
    """Number of parameters on the rank that has the most."""
    return max(pipeline_stage_parameters(workload.model, layout, one, workload.head) for one in range(layout.pipeline))


def gib(size: float) -> str:
    """A number of bytes in GiB, in words."""
    return f"{size / GIB:.1f} GiB"


def sizes(layout: Layout) -> str:
    """The parallel sizes, whose product is the number of processes, in words."""
    return f"tensor {layout.tensor} x data {layout.data} x pipeline {layout.pipeline}"


def global_batch(config: RunConfig, workload: Workload, layout: Layout) -> list[Row]:
    """Rows that say how the samples of a step are split into micro-batches."""
    unit, batch = spec_of(config).work(config).unit, workload.global_batch_size
    if layout.max_tokens_per_micro_batch is None:
        parts = f"micro-batch {layout.micro_batch_size} x data {layout.data} x {layout.num_micro_batches} micro-batches"
        return [("global batch", f"{batch} {unit} = {parts}")]
    longer = "a longer group is cut in parts" if spec_of(config).rounds else f"longer {unit} are refused"
    return [
        ("global batch", f"{batch} {unit} over {layout.data} replicas, by length"),
        ("micro-batch", f"at most {layout.max_tokens_per_micro_batch:,} tokens; {longer}"),
    ]


def learning_rate(config: RunConfig) -> str:
    """The peak of the learning rate and the shape of its decay, in words."""
    optimizer = config.optimizer
    return f"{optimizer.lr:g}, {optimizer.lr_decay_style} to {optimizer.min_lr:g}"
