"""Supervised fine-tuning on prompt/response records."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_brain.config.stage_spec import TRAIN_DATA, VALID_DATA
from megatron_brain.data.corpus import num_tokens
from megatron_brain.data.groups import PackedBatch
from megatron_brain.data.on_demand import OnDemand
from megatron_brain.data.packing import pack_by_length
from megatron_brain.objectives.sft import negative_log_likelihood
from megatron_brain.stages.dataset_stage import DatasetStage
from megatron_brain.training.best import Direction
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import Trainer


class SFTStage(DatasetStage):
    """Samples are sequences packed with records; the loss is the mean over response tokens of the global batch."""

    occasional_metrics = ("entropy", "top1_accuracy")
    directions: Mapping[str, Direction] = {"loss": "lowest", "top1_accuracy": "highest"}
    shown_metrics = ("loss", "entropy", "top1_accuracy", "tokens_per_second")

    def __init__(self, run: Run) -> None:
        data = run.config.data
        train = run.read(TRAIN_DATA)
        if run.config.sft.packing:
            bins = pack_by_length(num_tokens(train), data.seq_length, seed=run.config.training.seed)
            samples = OnDemand(len(bins), lambda index: [train[i] for i in bins[index]])
        else:
            samples = OnDemand(len(train), lambda index: [train[index]])
        valid = run.read(VALID_DATA)
        # The packed length decides which records a sample holds.
        packed_length = data.seq_length if run.config.sft.packing else 0
        valid_samples = OnDemand(len(valid), lambda index: [valid[index]])
        super().__init__(run, samples, valid_samples, fixed={"packed_length": packed_length})

    def prepare(self, trainer: Trainer, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches with the gradient of the loss, a constant: the loss is linear in the log-probabilities."""
        return [dataclasses.replace(batch, known_gradient=-batch.loss_mask.float()) for batch in batches]

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        """Loss from `output`: log-probabilities `[N]`; in validation rows of those, of entropies and of agreements."""
        count, means = int(batch.loss_mask.sum()), {}
        if batch.token_scores:
            output, *others = output
            sums = [torch.where(batch.loss_mask, values, 0.0).sum() for values in others]
            means = {name: (total, count) for name, total in zip(self.occasional_metrics, sums, strict=True)}
        return LossOutput(loss_sum=negative_log_likelihood(output, batch.loss_mask), count=count, means=means)
