"""Decides which samples make up each optimizer step, and which a replica takes, from the data and the seed alone."""

from collections.abc import Sequence
from typing import TypeVar

import numpy

Item = TypeVar("Item")


class SampleOrder:
    """An endless stream over `num_samples` samples, shuffled anew every epoch.

    Sample k of the stream depends on the seed and k only, so a run may stop after any step and continue exactly, at any
    data-parallel size. No sample is left out: a batch at the end of an epoch is filled from the next epoch.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        assert num_samples >= 1, "there are no samples to train on"
        self.num_samples = num_samples
        self._seed = seed
        self._epoch = -1
        self._permutation = numpy.empty(0, dtype=numpy.int64)

    def __getitem__(self, place: int) -> int:
        """Index of the sample at a place of the stream."""
        epoch, offset = divmod(place, self.num_samples)
        if epoch != self._epoch:
            self._permutation = numpy.random.default_rng([self._seed, epoch]).permutation(self.num_samples)
            self._epoch = epoch
        return int(self._permutation[offset])

    def step(self, iteration: int, batch_size: int) -> list[int]:
        """Indices of the samples of one step, counted from 0."""
        return [self[iteration * batch_size + i] for i in range(batch_size)]


def replica_share(items: Sequence[Item], *, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[Item]]:
    """A replica's micro-batches of a global batch. The replicas get micro-batches in turn.

    The batch must divide into whole micro-batches, equally many per replica.
    """
    per_turn = micro_batch_size * dp_size
    assert len(items) % per_turn == 0, (
        f"a global batch of {len(items)} does not divide by micro-batch x replicas = {per_turn}"
    )
    starts = range(dp_rank * micro_batch_size, len(items), per_turn)
    return [list(items[start : start + micro_batch_size]) for start in starts]
