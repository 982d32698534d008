"""Settings from which this process or a worker builds the stage's reader with the run's tokenizer."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of
from megatron_brain.config.template_date import parse_date
from megatron_brain.data.records import RecordReader
from megatron_brain.data.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """The settings that a :class:`RecordReader` is built from. They can be sent to another process."""

    config: RunConfig
    """The run's configuration. Its template date is what chat templates take for today's; None: the time when the
    tokenizer is loaded."""
    tokenizer_type: str
    tokenizer_model: str
    """Directory, hub name or file of the tokenizer."""
    make_reader: Callable[[RunConfig, Tokenizer], RecordReader[Any]]
    """The `StageSpec.reader` of the stage, which another process may not have registered."""

    @classmethod
    def of(cls, config: RunConfig, tokenizer_type: str, tokenizer_model: str) -> "ReadingSettings":
        """The settings of the configuration's stage."""
        reader = spec_of(config).reader
        return cls(config=config, tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model, make_reader=reader)

    @property
    def template_date(self) -> str | None:
        """The date that chat templates take for today's; None where it is not set yet."""
        return self.config.tokenizer.template_date

    def at(self, date: str) -> "ReadingSettings":
        """The same settings with a date for chat templates."""
        tokenizer = dataclasses.replace(self.config.tokenizer, template_date=date)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, tokenizer=tokenizer))

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded.

        Raises:
            ConfigError: there is no such tokenizer.
        """
        tokenizer = build_tokenizer(self.tokenizer_type, self.tokenizer_model, self.config.tokenizer.chat_template)
        if self.template_date is not None:
            tokenizer.template_time = parse_date(self.template_date)
        return tokenizer

    def build(self) -> RecordReader[Any]:
        """The reader, its tokenizer loaded.

        Raises:
            ConfigError: no such tokenizer, or limits that leave no room.
        """
        return self.make_reader(self.config, self.open_tokenizer())
