"""The descriptor of the sft stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_brain.config.checks import require_data_and_start
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import TRAIN_DATA, TRAINING_SECTIONS, VALID_DATA, StageSpec, Work

if TYPE_CHECKING:
    from megatron_brain.data.groups import Group
    from megatron_brain.data.records import SFTReader
    from megatron_brain.data.tokenizer import Tokenizer


def _reader(config: RunConfig, tokenizer: Tokenizer) -> SFTReader:
    from megatron_brain.data.records import SFTReader

    return SFTReader(tokenizer, config.data, multi_turn_loss=config.sft.multi_turn_loss)


def _num_samples(config: RunConfig, items: Sequence[Group]) -> int:
    from megatron_brain.data.corpus import num_tokens
    from megatron_brain.data.packing import pack_by_length

    if not config.sft.packing:
        return len(items)
    return len(pack_by_length(num_tokens(items), config.data.seq_length, seed=config.training.seed))


def _work(config: RunConfig) -> Work:
    packed = config.sft.packing
    return Work(unit="sequences" if packed else "records", packed=packed)


SFT = StageSpec(
    name="sft",
    help="supervised fine-tuning on prompt/response records",
    code="megatron_brain.stages.sft.stage:SFTStage",
    sections=(*TRAINING_SECTIONS, "sft"),
    linear_loss=True,
    require=require_data_and_start,
    sources=lambda config: (TRAIN_DATA, VALID_DATA),
    reader=_reader,
    reads=("multi_turn_loss",),
    num_samples=_num_samples,
    work=_work,
)
