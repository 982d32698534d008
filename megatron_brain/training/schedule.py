"""Runs micro-batches through megatron-core's pipeline schedules, with or without the backward pass."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_brain.config.training import TrainingConfig
from megatron_brain.data.group_schedule import GroupLengths, MicroBatch, plan_groups
from megatron_brain.data.groups import Group, PackedBatch, pack_groups, packed_length
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.training.report import LossOutput

LossFunction = Callable[[Tensor, PackedBatch], LossOutput]


def plan_step(
    groups: Sequence[Group],
    training: TrainingConfig,
    parallel: Parallel,
    *,
    interleaved: bool,
    round_to: int,
    step: int,
    splittable: bool,
) -> list[MicroBatch]:
    """This replica's micro-batches of a step over `groups`. Each has at most --max-tokens-per-micro-batch tokens.

    Args:
        groups: the groups of the whole global batch, the same on every rank.
        interleaved: whether the number of micro-batches must be a multiple of the pipeline-parallel size.
        round_to: lengths of packed sequences are multiples of this.
        step: number of the step. With the seed it decides ties.
        splittable: whether a group that does not fit may be cut into parts.
    """
    return plan_groups(
        [GroupLengths(len(group.prompt), tuple(map(len, group.responses))) for group in groups],
        replicas=parallel.dp_size,
        max_tokens=training.max_tokens_per_micro_batch,
        seed=training.seed + step,
        shared_prefix=training.shared_prefix,
        splittable=splittable,
        round_to=round_to,
        count_multiple_of=parallel.pp_size if interleaved else 1,
        labels=[group.record_id for group in groups],
    )[parallel.dp_rank]


def pack_micro_batches(
    micro_batches: Sequence[Sequence[Group]], parallel: Parallel, *, shared_prefix: bool, multiple_of: int = 1
) -> list[PackedBatch]:
    """Pack each micro-batch into one sequence. A micro-batch without groups is padding only.

    Lengths are multiples of the tensor-parallel size, over which sequences may be split, and of `multiple_of`, the
    model's `packed_multiple`. Pipeline stages exchange tensors of one shape, so with them all have the longest length.
    """
    unit = math.lcm(parallel.tp_size, multiple_of)
    lengths = [
        max(unit, packed_length(groups, shared_prefix=shared_prefix, multiple_of=unit)) for groups in micro_batches
    ]
    if parallel.pp_size > 1:
        lengths = [max(lengths, default=0)] * len(lengths)
    return [
        pack_groups(groups, shared_prefix=shared_prefix, length=length)
        for groups, length in zip(micro_batches, lengths, strict=True)
    ]


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    loss_function: LossFunction,
    parallel: Parallel,
    *,
    forward_only: bool = False,
) -> list[LossOutput]:
    """Loss of every micro-batch on the last pipeline stage, nothing on others. Gradients are in the model's buffers.

    Args:
        chunks: this rank's model chunks, wrapped by megatron-core's DistributedDataParallel unless `forward_only`.
        batches: this replica's micro-batches. With several pipeline stages all have one length.
    """

    def loss_and_count(batch: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
        result = loss_function(output, batch)
        # Three values make megatron-core divide the summed gradient by the count over the global batch.
        count = torch.tensor(result.count, dtype=torch.int, device=output.device)
        # A report with a graph would keep the micro-batch's pipeline input and its gradient until the step ends.
        return result.loss_sum, count, dataclasses.replace(result, loss_sum=result.loss_sum.detach())

    return _run(chunks, batches, loss_and_count, parallel, forward_only=forward_only)


@torch.no_grad()
def forward(chunks: Sequence[Chunk], batches: Sequence[PackedBatch], parallel: Parallel) -> list[Tensor]:
    """The model's output for every micro-batch, on all pipeline stages of the replica.

    Returns:
        per batch `[N]` token log-probabilities of a policy or `[R]` rewards of a reward model, float32.
    """
    if not batches:
        return []
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    outputs = _run(chunks, batches, _keep_output, parallel, forward_only=True, collect_non_loss_data=True)
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    if parallel.pp_size > 1:
        size = torch.tensor([output.numel() for output in outputs] or [0] * len(batches), device=parallel.device)
        sizes = parallel.broadcast_from_last_pipeline_stage(size).tolist()
        flat = torch.cat(outputs) if outputs else torch.empty(sum(sizes), device=parallel.device)
        outputs = list(parallel.broadcast_from_last_pipeline_stage(flat).split(sizes))
    return outputs


def _keep_output(batch: PackedBatch, output: Tensor, *, non_loss_data: bool) -> Tensor:
    return output


def _run(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    after: Callable,
    parallel: Parallel,
    **options,
) -> list:
    if not batches:
        return []
    count = len(batches)
    if len(chunks) > 1 and options["forward_only"]:
        # The interleaved schedule needs a multiple of the pipeline-parallel size. The copies are left out below.
        batches = [*batches, *[batches[-1]] * (-count % parallel.pp_size)]

    def forward_step(batches, model):
        batch = next(batches).to(parallel.device)
        return model(batch), partial(after, batch)

    iterators = [iter(batches) for _ in chunks]
    one = len(chunks) == 1
    with fp8_state.preserved(chunks) if options["forward_only"] else fp8_state.one_step(chunks):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if one else iterators,
            model=chunks[0] if one else list(chunks),
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.size(1),
            micro_batch_size=1,
            **options,
        )
    return results[:count]
