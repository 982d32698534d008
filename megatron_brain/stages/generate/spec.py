"""The descriptor of the generate stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_brain.config.checks import require_set
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import PROMPTS, Output, StageSpec, Work
from megatron_brain.errors import ConfigError

if TYPE_CHECKING:
    from megatron_brain.data.records import PromptReader
    from megatron_brain.data.tokenizer import Tokenizer


def _require(config: RunConfig) -> None:
    if not (config.checkpoint.load or config.model.hf_model):
        raise ConfigError("load is not set: the generate stage needs --load (a checkpoint) or --hf-model")
    require_set(config, "generate.prompts", "generate.output")


def read_prompts(config: RunConfig, tokenizer: Tokenizer) -> PromptReader:
    """The reader of prompts. A prompt must leave room for --max-new-tokens."""
    from megatron_brain.data.records import PromptReader

    room, keeps = config.sampling.max_new_tokens, config.scoring.reads_records
    return PromptReader(tokenizer, config.data, room=room, keeps_fields=keeps)


def output(config: RunConfig) -> tuple[Output]:
    """The file of --output."""
    return (Output(flag="--output", place=config.generate.output),)


GENERATE = StageSpec(
    name="generate",
    help="sample responses for a file of prompts",
    code="megatron_brain.stages.generate.stage:main",
    sections=("sampling", "engine", "generate"),
    require=_require,
    sources=lambda config: (PROMPTS,),
    reader=read_prompts,
    work=lambda config: Work(unit="prompts", responses_per_prompt=config.sampling.samples_per_prompt, draws=True),
    outputs=output,
)
