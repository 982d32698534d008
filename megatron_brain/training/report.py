"""The report of a micro-batch, and the sums over micro-batches and replicas of reports and of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_brain.data.groups import PackedBatch
from megatron_brain.runtime.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Loss of one micro-batch on the last pipeline stage.

    The gradient is that of `loss_sum / (count summed over the global batch)`. So the step's loss is one mean over the
    global batch, for any layout and any micro-batches. `means` maps a metric to (sum, count).
    """

    loss_sum: Tensor
    count: int
    means: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


def reduce_reports(
    reports: Sequence[LossOutput],
    parallel: Parallel,
    *,
    mean_names: Sequence[str] = (),
    max_names: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of a step, on all ranks: "loss" and other means over all micro-batches and replicas, and maxima.

    Args:
        reports: one per micro-batch on the last pipeline stage; none on other pipeline stages.
        mean_names: the means that every report has. All ranks know the names, so two small reductions are enough.
        max_names: the maxima that every report has.
    """
    sums = torch.zeros(1 + len(mean_names), 2, dtype=torch.float64)
    peaks = torch.full((len(max_names),), -torch.inf, dtype=torch.float64)
    for report in reports:
        assert set(report.means) == set(mean_names) and set(report.maxima) == set(max_names), (
            f"a report carries {[*report.means, *report.maxima]}, declared are {[*mean_names, *max_names]}"
        )
        rows = [(report.loss_sum, report.count), *(report.means[name] for name in mean_names)]
        sums += torch.tensor([[float(total.detach()), float(count)] for total, count in rows], dtype=torch.float64)
        if max_names:
            mine = torch.tensor([float(report.maxima[name]) for name in max_names], dtype=torch.float64)
            peaks = torch.maximum(peaks, mine)
    sums, peaks = sums.to(parallel.device), peaks.to(parallel.device)
    dist.all_reduce(sums, group=parallel.groups.dp)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=parallel.groups.dp)
    parallel.broadcast_from_last_pipeline_stage(sums)
    parallel.broadcast_from_last_pipeline_stage(peaks)
    metrics = {name: (total / count).item() for name, (total, count) in zip(("loss", *mean_names), sums, strict=True)}
    return metrics | {name: peak.item() for name, peak in zip(max_names, peaks, strict=True)}


def count_tokens(batches: Sequence[PackedBatch], parallel: Parallel, *, shared_prefix: bool) -> dict[str, float]:
    """Metrics of the tokens of a step over all replicas: "tokens" without padding, and two means."""
    counts = [
        sum(group.num_tokens(shared_prefix=shared_prefix) for batch in batches for group in batch.groups),
        sum(batch.tokens.numel() for batch in batches),
        sum(batch.targets.numel() for batch in batches),
        sum(batch.num_responses for batch in batches),
    ]
    total = parallel.sum_over_data_parallel(torch.tensor(counts, dtype=torch.float64, device=parallel.device)).tolist()
    return {
        "tokens": total[0],
        "padding_fraction": 1 - total[0] / total[1],
        "response_length": total[2] / total[3],
    }
