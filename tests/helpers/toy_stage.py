"""A new stage in one file: supervised fine-tuning on completions with a suffix. Its loss has a weight.

    torchrun --nproc-per-node 2 tests/helpers/toy_stage.py toy --train-data FILE ...

One line registers it. docs/extending.md shows this file as the recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_brain.__main__ import main as run_command
from megatron_brain.config.checks import require_data_and_start
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import (
    TRAIN_DATA,
    TRAINING_SECTIONS,
    VALID_DATA,
    StageSpec,
    Work,
    register_stage,
)
from megatron_brain.data.groups import PackedBatch
from megatron_brain.data.on_demand import OnDemand
from megatron_brain.data.records import SFTReader
from megatron_brain.errors import ConfigError
from megatron_brain.objectives.sft import negative_log_likelihood
from megatron_brain.stages.dataset_stage import DatasetStage
from megatron_brain.training.report import LossOutput
from megatron_brain.training.run import Run


@dataclass(kw_only=True)
class ToyConfig:
    """Settings of the toy stage."""

    toy_weight: float = 1.0
    """Factor of the loss."""

    toy_suffix: str | None = None
    """Text that is added to the end of every completion."""


class ToyReader(SFTReader):
    """Reads records as `sft` does, and adds the suffix to every completion."""

    stage = "toy"

    def __init__(self, tokenizer: Any, limits: Any, *, suffix: str) -> None:
        super().__init__(tokenizer, limits)
        self._suffix = suffix

    def draft(self, where: str, record: Mapping[str, Any]) -> Any:
        return super().draft(where, {**record, "completion": record["completion"] + self._suffix})


def read(config: RunConfig, tokenizer: Any) -> ToyReader:
    return ToyReader(tokenizer, config.data, suffix=config.section("toy").toy_suffix or "")


def require(config: RunConfig) -> None:
    require_data_and_start(config)
    if config.section("toy").toy_weight <= 0:
        raise ConfigError(f"toy_weight={config.section('toy').toy_weight}: must be positive")


class ToyStage(DatasetStage):
    """Samples are records; the loss is that of supervised fine-tuning times the weight."""

    def __init__(self, run: Run) -> None:
        self._weight = run.config.section("toy").toy_weight
        train, valid = run.read(TRAIN_DATA), run.read(VALID_DATA)
        super().__init__(run, *(OnDemand(len(items), lambda i, of=items: [of[i]]) for items in (train, valid)))

    def loss(self, output: Tensor, batch: PackedBatch) -> LossOutput:
        total = self._weight * negative_log_likelihood(output, batch.loss_mask)
        return LossOutput(loss_sum=total, count=int(batch.loss_mask.sum()))


TOY = StageSpec(
    name="toy",
    help="supervised fine-tuning of a toy",
    code=ToyStage,
    sections=(*TRAINING_SECTIONS, "toy"),
    settings={"toy": ToyConfig},
    require=require,
    sources=lambda config: (TRAIN_DATA, VALID_DATA),
    reader=read,
    reads=("toy_suffix",),
    work=lambda config: Work(unit="toys"),
)

if __name__ == "__main__":
    register_stage(TOY)
    sys.exit(run_command(sys.argv[1:]))
