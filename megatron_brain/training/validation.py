"""Runs held-out or to-be-scored groups through a model, forward only."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_brain.config.stage_spec import Head
from megatron_brain.data.groups import Group
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel
from megatron_brain.training.report import LossOutput, reduce_reports
from megatron_brain.training.schedule import LossFunction, forward, forward_backward, pack_micro_batches

_WINDOW = 16
"""Micro-batches that share one padded length."""


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
    """Loss and metrics of samples every replica holds, each replica computing its share.

    Args:
        token_scores: of the batches that `loss_function` gets.
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
    entropy: bool = False,
) -> list[list[Tensor]]:
    """Sequence log-probabilities (policy) or rewards (reward model) of this replica's groups.

    Args:
        micro_batches: groups computed together.
        window: micro-batches that share a padded length in a pipeline. With training's micro-batches and as many as a
            step has, scores are bit for bit what training computes.
        temperature: divides the logits behind the log-probabilities.
        entropy: also tell the entropies of a policy, summed over the tokens of each response, in nats.

    Returns:
        per micro-batch and group a `[n]` float32 tensor on the CPU, on all pipeline stages; with `entropy` `[2, n]`:
        the log-probabilities and the entropies.
    """
    scored: list[list[Tensor]] = []
    for start in range(0, len(micro_batches), window):
        batches = pack_micro_batches(
            micro_batches[start : start + window],
            parallel,
            shared_prefix=shared_prefix,
            multiple_of=chunks[0].packed_multiple,
        )
        batches = [dataclasses.replace(batch, temperature=temperature, token_scores=entropy) for batch in batches]
        for batch, output in zip(batches, forward(chunks, batches, parallel), strict=True):
            values = output.cpu()
            if entropy:
                values = torch.stack([batch.sum_per_response(row) for row in values[:2]])
            elif head == "policy":
                values = batch.sum_per_response(values)
            scored.append(list(values.split([len(group.responses) for group in batch.groups], dim=-1)))
    return scored


def _windows(
    samples: Sequence[Sequence[Group]], mine: Sequence[int], micro_batch_size: int, *, shared_prefix: bool
) -> Iterator[list[list[Group]]]:
    """Micro-batches of the samples `mine`, shortest first. Samples may be made on demand: few are held at a time."""
    by_length = sorted(mine, key=lambda i: sum(group.num_tokens(shared_prefix=shared_prefix) for group in samples[i]))
    for start in range(0, len(by_length), _WINDOW * micro_batch_size):
        window = by_length[start : start + _WINDOW * micro_batch_size]
        yield [
            [group for i in window[first : first + micro_batch_size] for group in samples[i]]
            for first in range(0, len(window), micro_batch_size)
        ]
