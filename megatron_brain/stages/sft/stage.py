"""Supervised fine-tuning on prompt/response records."""

import dataclasses
import logging
from collections.abc import Sequence

from torch import Tensor

from megatron_brain.config.stage_spec import TRAIN_DATA, VALID_DATA
from megatron_brain.data.corpus import num_tokens
from megatron_brain.data.groups import PackedBatch
from megatron_brain.data.on_demand import OnDemand
from megatron_brain.data.packing import pack_by_length
from megatron_brain.objectives.sft import negative_log_likelihood
from megatron_brain.stages.dataset_stage import DatasetStage
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer

log = logging.getLogger(__name__)


class SFTStage(DatasetStage):
    """Samples are sequences packed with records; the loss is the mean over response tokens of the global batch."""

    def __init__(self, run: Run) -> None:
        data = run.config.data
        train = run.read(TRAIN_DATA)
        if run.config.sft.packing:
            bins = pack_by_length(num_tokens(train), data.seq_length, seed=run.config.training.seed)
            samples = OnDemand(len(bins), lambda index: [train[i] for i in bins[index]])
            log.info("packed %d records into %d sequences of at most %d tokens", len(train), len(bins), data.seq_length)
        else:
            samples = OnDemand(len(train), lambda index: [train[index]])
        valid = run.read(VALID_DATA)
        # Which records a sample holds follows from the length that they are packed into.
        packed_length = data.seq_length if run.config.sft.packing else 0
        valid_samples = OnDemand(len(valid), lambda index: [valid[index]])
        super().__init__(run, samples, valid_samples, fixed={"packed_length": packed_length})

    def prepare(self, trainer: Trainer, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The loss is linear in the log-probabilities: their gradient is known before they are."""
        return [dataclasses.replace(batch, known_gradient=-batch.loss_mask.float()) for batch in batches]

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Output: response tokens' log-probabilities `[N]`."""
        return LossOutput(loss_sum=negative_log_likelihood(output, batch.loss_mask), count=int(batch.loss_mask.sum()))


def main(run: Run) -> None:
    """Train."""
    Trainer(run, SFTStage(run)).train()
