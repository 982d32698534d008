"""Makes reading settings of a stage in the way of the data tools, which take them from their flags."""

import dataclasses
from typing import Any

from megatron_brain.config.data import DataConfig
from megatron_brain.config.loader import config_from_dict
from megatron_brain.config.stage_spec import stage_spec
from megatron_brain.data.reading_settings import ReadingSettings


def reading_settings(
    *, stage: str, tokenizer_type: str, tokenizer_model: str, limits: DataConfig, **settings: Any
) -> ReadingSettings:
    """`settings` are those of other sections, by name. Those that the stage does not read are left out."""
    reads = ("chat_template", "template_date", *(name for name in settings if name in stage_spec(stage).reads))
    given = {name: settings[name] for name in reads if name in settings}
    config = dataclasses.replace(config_from_dict(stage, given), data=limits)
    return ReadingSettings.of(config, tokenizer_type, tokenizer_model)
