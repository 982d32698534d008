"""Tokenizer, records and their lengths."""

from dataclasses import dataclass
from typing import Literal

from megatron_brain.config.template_date import parse_date
from megatron_brain.errors import ConfigError


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer; a checkpoint carries its own, which is the default."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] = "HuggingFaceTokenizer"
    """Kind of the tokenizer in --tokenizer-model."""

    tokenizer_model: str | None = None
    """Directory, hub name or .model file of the tokenizer; default: that of the loaded checkpoint or of --hf-model."""

    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template; checkpoints and exports keep it."""

    template_date: str | None = None
    """Date that chat templates write as today's, such as 2026-11-30 or 2026-11-30T12:00; default: that of the
    checkpoint the run starts from, else the time of the start. A run keeps it."""

    def __post_init__(self) -> None:
        if self.template_date is not None:
            parse_date(self.template_date)


@dataclass(kw_only=True)
class DataConfig:
    """Records to train on, and what to do with those that are too long."""

    train_data: str | None = None
    """Training records: jsonl, json, parquet or Arrow file, glob, saved `datasets` folder, hub name, or the prefix of
    data that tools/preprocess_data.py has prepared."""

    valid_data: str | None = None
    """Validation records, of the same kinds; unset: no validation."""

    train_split: str = "train"
    """Split of a hub data set to train on."""

    valid_split: str = "validation,test"
    """Split of a hub data set to validate on or to answer; with commas the first of these that it has."""

    max_train_records: int | None = None
    """Largest number of training records; the first ones are used. Unset: all."""

    max_valid_records: int | None = None
    """Largest number of validation records; the first ones are used. Unset: all."""

    seq_length: int = 1024
    """Longest prompt plus response, in tokens; with packing also the length of the packed sequences."""

    max_prompt_length: int | None = None
    """Longest prompt, in tokens; unset: only --seq-length limits it."""

    max_response_length: int | None = None
    """Longest response with its EOS, in tokens; unset: only --seq-length limits it."""

    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a record over a length limit. Drops and truncations are counted and reported."""

    def __post_init__(self) -> None:
        for name in (
            "seq_length",
            "max_prompt_length",
            "max_response_length",
            "max_train_records",
            "max_valid_records",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        for name in ("max_prompt_length", "max_response_length"):
            value = getattr(self, name)
            if value is not None and value >= self.seq_length:
                raise ConfigError(f"{name}={value} leaves no room inside seq_length={self.seq_length}")
