"""The descriptor of the reward stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_brain.config.checks import require_data_and_start
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import TRAIN_DATA, TRAINING_SECTIONS, VALID_DATA, StageSpec, Work

if TYPE_CHECKING:
    from megatron_brain.data.records import PreferenceReader
    from megatron_brain.data.tokenizer import Tokenizer


def _reader(config: RunConfig, tokenizer: Tokenizer) -> PreferenceReader:
    from megatron_brain.data.records import PreferenceReader

    return PreferenceReader(tokenizer, config.data)


REWARD = StageSpec(
    name="reward",
    help="reward model from preference pairs",
    code="megatron_brain.stages.reward.stage:RewardStage",
    sections=(*TRAINING_SECTIONS, "reward"),
    head="reward",
    require=require_data_and_start,
    sources=lambda config: (TRAIN_DATA, VALID_DATA),
    reader=_reader,
    work=lambda config: Work(unit="pairs", responses_per_prompt=2),
)
