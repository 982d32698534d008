"""Supervised fine-tuning on prompt/response records."""

import dataclasses
import logging
from collections.abc import Sequence

from torch import Tensor

from megatron_brain.data.groups import Group, PackedBatch
from megatron_brain.data.packing import pack_by_length
from megatron_brain.data.records import sft_groups
from megatron_brain.data.sources import load_records
from megatron_brain.objectives.sft import negative_log_likelihood
from megatron_brain.stages.samples import SampledStage
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer

log = logging.getLogger(__name__)


class SFTStage(SampledStage):
    """Samples are sequences packed with records; the loss is the mean over response tokens of the global batch."""

    head = "policy"

    def __init__(self, run: Run) -> None:
        data = run.config.data
        train = self._read(run, data.train_data, data.train_split, data.max_train_records)
        if run.config.sft.packing:
            lengths = [group.num_tokens(shared_prefix=True) for group in train]
            bins = pack_by_length(lengths, data.seq_length, seed=run.config.training.seed)
            samples = [[train[i] for i in records] for records in bins]
            log.info("packed %d records into %d sequences of at most %d tokens", len(train), len(bins), data.seq_length)
        else:
            samples = [[group] for group in train]
        valid = self._read(run, data.valid_data, data.valid_split, data.max_valid_records) if data.valid_data else []
        super().__init__(run, samples, [[group] for group in valid])

    def _read(self, run: Run, source: str, split: str, limit: int | None) -> Sequence[Group]:
        records = load_records(source, split, limit)
        groups, report = sft_groups(
            records, run.tokenizer, run.config.data, multi_turn_loss=run.config.sft.multi_turn_loss
        )
        log.info("%s: %s", source, report)
        return groups

    def prepare(self, trainer: Trainer, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The loss is linear in the log-probabilities: their gradient is known before they are."""
        return [dataclasses.replace(batch, known_gradient=-batch.loss_mask.float()) for batch in batches]

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Output: response tokens' log-probabilities `[N]`."""
        return LossOutput(loss_sum=negative_log_likelihood(output, batch.loss_mask), count=int(batch.loss_mask.sum()))


def main(run: Run) -> None:
    """Train."""
    Trainer(run, SFTStage(run)).train()
