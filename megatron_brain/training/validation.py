"""Runs groups through a model without a backward pass, to validate on them or to score them."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_brain.config.stage_spec import Head
from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.training.report import LossOutput, reduce_reports
from megatron_brain.training.schedule import LossFunction, forward, forward_backward, pack_micro_batches

_WINDOW = 16
"""This many micro-batches share one padded length."""


@torch.no_grad()
def mean_loss(
    chunks: Sequence[Chunk],
    samples: Sequence[Sequence[Group]],
    loss_function: LossFunction,
    parallel: Parallel,
    *,
    micro_batch_size: int,
    shared_prefix: bool,
    mean_names: Sequence[str] = (),
    max_names: Sequence[str] = (),
    token_scores: bool = False,
) -> dict[str, float]:
    """Loss and metrics of samples. Every replica holds all samples and computes its share of them.

    Args:
        token_scores: `PackedBatch.token_scores` of the batches that `loss_function` gets.
    """
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    mine = range(parallel.dp_rank, len(samples), parallel.dp_size)
    reports: list[LossOutput] = []
    for window in _windows(samples, mine, micro_batch_size, shared_prefix=shared_prefix):
        batches = pack_micro_batches(
            window, parallel, shared_prefix=shared_prefix, multiple_of=chunks[0].packed_multiple
        )
        batches = [dataclasses.replace(batch, token_scores=token_scores) for batch in batches]
        reports += forward_backward(chunks, batches, loss_function, parallel, forward_only=True)
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    return reduce_reports(reports, parallel, mean_names=mean_names, max_names=max_names)


def score_groups(
    chunks: Sequence[Chunk],
    micro_batches: Sequence[Sequence[Group]],
    parallel: Parallel,
    *,
    head: Head,
    shared_prefix: bool,
    window: int = _WINDOW,
    temperature: float = 1.0,
) -> list[list[Tensor]]:
    """Log-probabilities of responses (policy) or rewards (reward model) of this replica's groups.

    Args:
        micro_batches: the groups that are computed together.
        window: how many micro-batches share a padded length with several pipeline stages. With the micro-batches and
            the number of them of a training step, scores are bit for bit what training computes.
        temperature: the logits are divided by it before the log-probabilities are computed.

    Returns:
        a `[n]` float32 tensor on the CPU for each group of each micro-batch, on all pipeline stages.
    """
    scored: list[list[Tensor]] = []
    for batch, output in outputs_of_groups(
        chunks, micro_batches, parallel, shared_prefix=shared_prefix, window=window, temperature=temperature
    ):
        values = output if head == "reward" else batch.sum_per_response(output)
        scored.append(list(values.split([len(group.responses) for group in batch.groups])))
    return scored


def outputs_of_groups(
    chunks: Sequence[Chunk],
    micro_batches: Sequence[Sequence[Group]],
    parallel: Parallel,
    *,
    shared_prefix: bool,
    window: int = _WINDOW,
    temperature: float = 1.0,
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """What a model computes for this replica's groups, with the arguments of `score_groups`.

    Yields:
        each micro-batch, packed, and on the CPU, on all pipeline stages, what the model gives for it: log-probabilities
        `[N]` of tokens (policy) or rewards `[R]` (reward model).
    """
    for start in range(0, len(micro_batches), window):
        batches = pack_micro_batches(
            micro_batches[start : start + window],
            parallel,
            shared_prefix=shared_prefix,
            multiple_of=chunks[0].packed_multiple,
        )
        batches = [dataclasses.replace(batch, temperature=temperature) for batch in batches]
        for batch, output in zip(batches, forward(chunks, batches, parallel), strict=True):
            yield batch, output.cpu()


def token_logprobs(
    chunks: Sequence[Chunk], sequences: Sequence[Sequence[int]], parallel: Parallel
) -> list[list[float]]:
    """log-probabilities, in nats, that a policy gives the tokens of each sequence after its first one.

    All ranks of a replica call it together, with the same sequences of at least two token ids.
    """
    groups = [
        [Group(prompt=(first,), responses=(tuple(rest),), record_id=f"sequence {place}")]
        for place, (first, *rest) in enumerate(sequences)
    ]
    batches = pack_micro_batches(groups, parallel, shared_prefix=True, multiple_of=chunks[0].packed_multiple)
    with torch.no_grad():
        outputs = forward(chunks, batches, parallel)
    return [output.tolist() for output in outputs]


def _windows(
    samples: Sequence[Sequence[Group]], mine: Sequence[int], micro_batch_size: int, *, shared_prefix: bool
) -> Iterator[list[list[Group]]]:
    """Micro-batches of the samples `mine`, shortest first. Few samples are held at a time."""
    by_length = sorted(mine, key=lambda i: sum(group.num_tokens(shared_prefix=shared_prefix) for group in samples[i]))
    for start in range(0, len(by_length), _WINDOW * micro_batch_size):
        window = by_length[start : start + _WINDOW * micro_batch_size]
        yield [
            [group for i in window[first : first + micro_batch_size] for group in samples[i]]
            for first in range(0, len(window), micro_batch_size)
        ]
