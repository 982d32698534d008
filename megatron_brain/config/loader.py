"""Reads the configuration of a run. The YAML file overrides defaults, and the command line overrides both.

YAML keys are the flag names without the leading dashes, flat: `micro_batch_size: 4` or `micro-batch-size: 4`.
argparse splits the command line and prints --help; the values of both sources go through one typed conversion
(`fields.convert`).
"""

import argparse
import functools
import os
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import yaml

from megatron_brain.config.checks import require
from megatron_brain.config.fields import (
    FieldSpec,
    all_fields,
    convert,
    section_fields,
    section_help,
    section_types,
    stage_fields,
)
from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import spec_of, stage_spec, stages
from megatron_brain.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class _Given:
    """A value as the user wrote it, and where."""

    value: object
    origin: str


def load_config(stage: str, argv: Sequence[str]) -> RunConfig:
    """The configuration of a stage from `--config FILE` and `--flag value` overrides.

    Args:
        stage: name of a registered stage.
        argv: arguments after the stage. Dashes and underscores in flag names mean the same; of a repeated flag the last
            one counts; `null` unsets an optional field.

    Raises:
        ConfigError: an unknown key, a key of another stage, a wrong type or value, a missing setting, or a file that
            cannot be read.
        SystemExit: after --help.
    """
    file, overrides = _parse_arguments(stage, argv)
    given = _read_yaml(stage, file) if file else {}
    config = _build(stage, given | overrides)
    require(config)
    return config


def config_from_dict(stage: str, values: Mapping[str, object], origin: str = "saved configuration") -> RunConfig:
    """The inverse of `config_to_dict`. Missing keys keep their defaults; required settings are not checked.

    Raises:
        ConfigError: as `load_config`; `origin` says in the message where the values came from.
    """
    return _build(stage, {key.replace("-", "_"): _Given(value, origin) for key, value in values.items()})


def config_to_dict(config: RunConfig) -> dict[str, object]:
    """`stage` and all settings that its stage reads in one flat dict of plain values (None, bool, int, float, str)."""
    fields = {name: getattr(config.section(spec.section), name) for name, spec in stage_fields(config.stage).items()}
    return {"stage": config.stage, **fields}


def config_to_yaml(config: RunConfig) -> str:
    """YAML text of `config_to_dict`, grouped by section. --config reads it back."""
    values = config_to_dict(config)
    lines = [_yaml_line("stage", config.stage)]
    for section in section_types():
        if section in spec_of(config).all_sections:
            lines.append(f"\n# {section}: {section_help(section)}\n")
            lines.extend(_yaml_line(spec.name, values[spec.name]) for spec in section_fields(section))
    return "".join(lines)


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write `config_to_yaml` to a file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(config_to_yaml(config))


def _yaml_line(key: str, value: object) -> str:
    line: str = yaml.safe_dump({key: value}, width=float("inf"), allow_unicode=True)
    return line


def _build(stage: str, given: Mapping[str, _Given]) -> RunConfig:
    """The sections from given values. Errors of the dataclasses get the origin of the keys that they name."""
    fields = stage_fields(stage)
    values: dict[str, dict[str, object]] = {section: {} for section in stage_spec(stage).all_sections}
    for key, item in given.items():
        if key == "stage":
            _check_stage(stage, item)
        elif key in fields:
            values[fields[key].section][key] = convert(fields[key], item.value, item.origin)
        else:
            raise _unknown_key(stage, key, item)
    sections = {}
    for section, arguments in values.items():
        try:
            sections[section] = section_types()[section](**arguments)
        except ConfigError as error:
            named = [f"{key} from {given[key].origin}" for key in arguments if re.search(rf"\b{key}\b", str(error))]
            raise ConfigError(f"{error} ({', '.join(named)})" if named else str(error)) from error
    more = {section: sections.pop(section) for section in stage_spec(stage).settings}
    return RunConfig(stage=stage, **sections, more=more)


def _check_stage(stage: str, item: _Given) -> None:
    """Raise ConfigError where a file says that it configures another stage."""
    if item.value != stage:
        raise ConfigError(
            f"stage={item.value!r} ({item.origin}): this configures another stage than {stage!r}; run that stage, or "
            "give another file"
        )


def _unknown_key(stage: str, key: str, item: _Given) -> ConfigError:
    """The error for a key that the stage does not have, with the key that was probably meant."""
    where = f"{key}={item.value!r} ({item.origin})"
    spec = all_fields().get(key)
    if spec is not None:
        owners = [name for name, other in stages().items() if spec.section in other.all_sections]
        return ConfigError(f"{where}: the {stage} stage does not read it; it belongs to {', '.join(owners)}")
    if key in section_types():
        return ConfigError(f"{where}: {key} is a section, not a key; keys are flat, write its keys at the top level")
    near = did_you_mean(key, stage_fields(stage))
    return ConfigError(f"{where}: unknown key{near or f'; `python -m megatron_brain {stage} --help` lists all'}")


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps help text without breaking flag names at their dashes."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ConfigErrors, reported like any other bad setting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def build_parser(stage: str) -> argparse.ArgumentParser:
    """The parser of a stage's flags, grouped by section. It keeps every value as text and has no defaults.

    Raises:
        ConfigError: there is no such stage.
    """
    spec = stage_spec(stage)
    width = min(max(shutil.get_terminal_size().columns, 80), 100)
    parser = _Parser(
        prog=f"python -m megatron_brain {stage}",
        usage=f"python -m megatron_brain {stage} [--config FILE] [--flag VALUE ...]",
        description="Defaults are overridden by the YAML file, and both by the command line. "
        "YAML keys are the flag names; null unsets an optional value. Defaults are in [brackets].",
        formatter_class=functools.partial(_HelpFormatter, width=width, max_help_position=34),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", action="append", help="YAML file of flat `key: value` lines")
    for section in section_types():
        if section in spec.all_sections:
            group = parser.add_argument_group(section, section_help(section))
            for setting in section_fields(section):
                _add_flag(group, setting)
    return parser


def _add_flag(group: argparse._ArgumentGroup, spec: FieldSpec) -> None:
    """Add one flag; a bool becomes the pair `--name` / `--no-name`."""
    text = spec.help.replace("%", "%%")
    if spec.default is not None:
        shown = ("on" if spec.default else "off") if spec.kind is bool else spec.default
        text += f" [{shown}]"
    if spec.kind is bool:
        group.add_argument(spec.flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else spec.kind.__name__.upper()
        group.add_argument(spec.flag, metavar=metavar, help=text)


def _parse_arguments(stage: str, argv: Sequence[str]) -> tuple[str | None, dict[str, _Given]]:
    """(YAML file or None, values by key). Flag names may use underscores."""
    argv = [_with_dashes(argument) for argument in argv]
    _refuse_values_of_bools(argv)
    values, unknown = build_parser(stage).parse_known_args(argv)
    if unknown:
        raise _unknown_argument(stage, argv, unknown)
    overrides = vars(values)
    files = overrides.pop("config", [])
    if len(files) > 1:
        raise ConfigError(f"command line: --config is given {len(files)} times ({', '.join(files)}); give one file")
    given = {key: _Given(None if value == "null" else value, "command line") for key, value in overrides.items()}
    return (files[0] if files else None), given


def _with_dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown_argument(stage: str, argv: Sequence[str], unknown: Sequence[str]) -> ConfigError:
    """The error for the first argument that argparse does not know."""
    first = unknown[0]
    if first.startswith("--"):
        name, equals, value = first.removeprefix("--").partition("=")
        if not equals and len(unknown) > 1 and not unknown[1].startswith("--"):
            value = unknown[1]
        return _unknown_key(stage, name.replace("-", "_"), _Given(value, "command line"))
    before = argv[argv.index(first) - 1] if argv.index(first) else ""
    if (spec := _bool_of(before)) is not None:
        return ConfigError(f"command line: {first!r} after {before}: {_no_value(spec)}")
    return ConfigError(f"command line: {first!r} does not follow a flag; values are given as --flag value")


def _refuse_values_of_bools(argv: Sequence[str]) -> None:
    """Raise ConfigError for `--bf16=true`, where argparse would not say the cure."""
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        if equals and (spec := _bool_of(flag)) is not None:
            raise ConfigError(f"command line: {argument}: {_no_value(spec)}")


def _bool_of(flag: str) -> FieldSpec | None:
    """The setting of `--name` or `--no-name`, if it is a bool."""
    if not flag.startswith("--"):
        return None
    spec = all_fields().get(flag.removeprefix("--").removeprefix("no-").replace("-", "_"))
    return spec if spec is not None and spec.kind is bool else None


def _no_value(spec: FieldSpec) -> str:
    return f"write {spec.flag} or --no-{spec.flag[2:]} without a value"


def _read_yaml(stage: str, path: str) -> dict[str, _Given]:
    """Keys of a YAML file with their text and line. Scalars stay text, because the field decides the type, not YAML.

    Raises:
        ConfigError: the file cannot be read, is not a flat mapping, or has a key twice.
    """
    root = _compose(path)
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ConfigError(f"{path}: expected lines of `key: value`, e.g. `micro_batch_size: 4`; found none")
    given: dict[str, _Given] = {}
    for key_node, value_node in root.value:
        origin = f"{path} line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{origin}: a key must be a name")
        key = key_node.value.replace("-", "_")
        if key in given:
            raise ConfigError(f"{key} ({origin}): duplicate key, already set in {given[key].origin}")
        given[key] = _Given(_scalar(value_node), origin)
        if not isinstance(value_node, yaml.ScalarNode) and key in stage_fields(stage):
            found = "a list" if isinstance(value_node, yaml.SequenceNode) else "a mapping"
            raise ConfigError(f"{key} ({origin}): expected {stage_fields(stage)[key].expected}, found {found}")
    return given


def _compose(path: str) -> yaml.Node | None:
    """The node tree of a YAML file."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.compose(file, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(
            f"--config {path}: {error.strerror or error} (looked for {os.path.abspath(path)}); give a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {path}: not UTF-8 text ({error.reason} at byte {error.start}); write the file as UTF-8"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}\nwrite lines of `key: value`") from error


def _scalar(node: yaml.Node) -> str | None:
    """Text of a scalar, None for an unquoted null. Anything else gives its YAML kind, for error messages."""
    if not isinstance(node, yaml.ScalarNode):
        return f"<{node.id}>"
    return None if node.tag == "tag:yaml.org,2002:null" else node.value
