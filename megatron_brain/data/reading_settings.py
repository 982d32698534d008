"""How the data tools are told to read records: the stage, its tokenizer and its limits, under the stages' flags."""

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_brain.config.data import DataConfig, TokenizerConfig
from megatron_brain.config.fields import section_fields
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.config.template_date import parse_date
from megatron_brain.data.records import PreferenceReader, PromptReader, RecordReader, SFTReader
from megatron_brain.data.tokenizer import TOKENIZER_TYPES, build_tokenizer
from megatron_brain.flag_types import positive

STAGES = ("sft", "reward", "brain")
_TEMPLATES = ("chat_template", "template_date")
_LIMITS = ("seq_length", "max_prompt_length", "max_response_length", "overlong")


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """What a :class:`RecordReader` is built from; can be sent to another process."""

    stage: str
    """Whose records they are: sft, reward or brain."""
    tokenizer_type: str
    tokenizer_model: str
    """Directory, hub name or file of the tokenizer."""
    limits: DataConfig
    """Length limits and the overlong rule."""
    chat_template: str | None = None
    """File of a template that replaces the tokenizer's."""
    template_date: str | None = None
    """What chat templates take for now; None: the time when the tokenizer is loaded."""
    multi_turn_loss: bool = False
    """sft: the loss counts every assistant turn."""
    max_new_tokens: int = SamplingConfig().max_new_tokens
    """brain: tokens that a prompt leaves free for its response."""

    def build(self) -> RecordReader[Any]:
        """The reader, its tokenizer loaded.

        Raises:
            ValueError: no such tokenizer, or limits that leave no room.
        """
        tokenizer = build_tokenizer(self.tokenizer_type, self.tokenizer_model, self.chat_template)
        if self.template_date is not None:
            tokenizer.template_time = parse_date(self.template_date)
        if self.stage == "sft":
            return SFTReader(tokenizer, self.limits, multi_turn_loss=self.multi_turn_loss)
        if self.stage == "reward":
            return PreferenceReader(tokenizer, self.limits)
        return PromptReader(tokenizer, self.limits, room=self.max_new_tokens)


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a stage that decide what becomes of its records."""
    parser.add_argument(
        "--stage",
        choices=STAGES,
        required=True,
        help="stage the records are for; brain: prompts, also those of generate and evaluate",
    )
    group = parser.add_argument_group("tokenizer (default: that of --load or --hf-model)")
    group.add_argument("--tokenizer-type", choices=tuple(TOKENIZER_TYPES), default="HuggingFaceTokenizer")
    group.add_argument("--tokenizer-model", help="directory, hub name or .model file")
    group.add_argument("--load", help="checkpoint whose tokenizer to use")
    group.add_argument("--hf-model", help="Hugging Face directory whose tokenizer to use")
    for spec in section_fields("tokenizer"):
        if spec.name in _TEMPLATES:
            group.add_argument(spec.flag, help=spec.help)
    group = parser.add_argument_group("limits, as the stage is given them")
    for spec in section_fields("data"):
        if spec.name in _LIMITS:
            text = spec.help + (f" [{spec.default}]" if spec.default is not None else "")
            group.add_argument(spec.flag, type=spec.kind, choices=spec.choices or None, default=spec.default, help=text)
    group.add_argument("--multi-turn-loss", action="store_true", help="sft: train on every assistant turn")
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=SamplingConfig().max_new_tokens,
        help="brain: tokens to leave for a response [%(default)s]",
    )


def reading_settings(args: argparse.Namespace) -> ReadingSettings:
    """The settings that the parsed flags say.

    Raises:
        ValueError: no tokenizer, or limits that contradict each other.
    """
    # Imported here, not in the worker processes: whatever reads checkpoints imports all of megatron-core.
    from megatron_brain.checkpointing import read_info
    from megatron_brain.checkpointing.locate_tokenizer import locate_tokenizer

    asked = TokenizerConfig(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        **{name: getattr(args, name) for name in _TEMPLATES},
    )
    checkpoint = read_info(args.load) if args.load else None
    kind, place = locate_tokenizer(asked, checkpoint, args.hf_model)
    return ReadingSettings(
        stage=args.stage,
        tokenizer_type=kind,
        tokenizer_model=place,
        limits=DataConfig(**{name: getattr(args, name) for name in _LIMITS}),
        chat_template=asked.chat_template,
        template_date=asked.template_date or (checkpoint.template_date if checkpoint else "") or None,
        multi_turn_loss=args.multi_turn_loss,
        max_new_tokens=args.max_new_tokens,
    )
