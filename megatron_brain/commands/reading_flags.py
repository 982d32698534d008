"""The flags that tell the data tools how to read records: the stage, its tokenizer and its limits."""

import argparse

from megatron_brain.checkpointing import read_info
from megatron_brain.checkpointing.locate_tokenizer import locate_tokenizer
from megatron_brain.config.fields import FieldSpec, all_fields, stage_fields
from megatron_brain.config.loader import config_from_dict
from megatron_brain.config.stage_spec import stages
from megatron_brain.data.reading_settings import ReadingSettings
from megatron_brain.data.tokenizer import TOKENIZER_TYPES
from megatron_brain.errors import ConfigError

_TEMPLATES = ("chat_template", "template_date")
_LIMITS = ("seq_length", "max_prompt_length", "max_response_length", "overlong")


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the stages that change how their records are read."""
    parser.add_argument(
        "--stage",
        choices=[name for name, spec in stages().items() if spec.trains],
        required=True,
        help="stage the records are for; brain: prompts, also those of generate and evaluate",
    )
    group = parser.add_argument_group("tokenizer (default: that of --load or --hf-model)")
    group.add_argument("--tokenizer-type", choices=tuple(TOKENIZER_TYPES), default="HuggingFaceTokenizer")
    group.add_argument("--tokenizer-model", help="directory, hub name or .model file")
    group.add_argument("--load", help="checkpoint whose tokenizer to use")
    group.add_argument("--hf-model", help="Hugging Face directory whose tokenizer to use")
    for name in _TEMPLATES:
        _add(group, all_fields()[name])
    group = parser.add_argument_group("limits, as the stage is given them")
    for name in _LIMITS:
        _add(group, all_fields()[name])
    group = parser.add_argument_group("settings of one stage")
    for name, readers in _settings_of_stages().items():
        _add(group, all_fields()[name], f"{', '.join(readers)}: ")


def _settings_of_stages() -> dict[str, list[str]]:
    """For each setting that changes how records are read, the names of its stages."""
    readers: dict[str, list[str]] = {}
    for stage, spec in stages().items():
        for name in spec.reads:
            readers.setdefault(name, []).append(stage)
    return readers


def _add(group: argparse._ArgumentGroup, spec: FieldSpec, stages_of_it: str = "") -> None:
    """Add a flag without a default, so that we know whether it was given."""
    shown = ("on" if spec.default else "off") if spec.kind is bool else spec.default
    text = stages_of_it + spec.help.replace("%", "%%") + (f" [{shown}]" if spec.default is not None else "")
    if spec.kind is bool:
        group.add_argument(spec.flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(spec.flag, type=spec.kind, choices=spec.choices or None, help=text)


def reading_settings(args: argparse.Namespace) -> ReadingSettings:
    """The settings from the parsed flags.

    Raises:
        ConfigError: there is no tokenizer, limits contradict each other, or a setting belongs to another stage.
    """
    names = ("tokenizer_type", "tokenizer_model", *_TEMPLATES, *_LIMITS, *_settings_of_stages())
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name in given.keys() - stage_fields(args.stage).keys():
        flag, readers = all_fields()[name].flag, ", ".join(_settings_of_stages()[name])
        raise ConfigError(f"{flag}: the {args.stage} stage does not read it, only {readers}; drop it")
    config = config_from_dict(args.stage, given, "command line")
    checkpoint = read_info(args.load) if args.load else None
    kind, place = locate_tokenizer(config.tokenizer, checkpoint, args.hf_model)
    reading = ReadingSettings.of(config, kind, place)
    if reading.template_date is None and checkpoint is not None and checkpoint.template_date:
        return reading.at(checkpoint.template_date)
    return reading
