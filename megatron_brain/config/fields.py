"""The fields of the configuration dataclasses as data: flag, type, choices, default and help text.

Only the dataclasses define settings. The command line, the YAML reader, --help and the tables of docs/configuration.md
are all made from the `FieldSpec`s that this module reads from them.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass

from megatron_brain.config.run import RunConfig
from megatron_brain.config.stage_spec import stage_spec, stages
from megatron_brain.errors import ConfigError, did_you_mean

_NO_SECTION = ("stage", "more")
"""Fields of RunConfig that hold no settings."""

_EXPECTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "non-empty text",
}


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One setting. `kind` is int, float, bool or str; `choices` is empty unless only some texts are allowed.

    The choices are those of a `Literal`, or the field's metadata `choices`: names that may still be added to.
    """

    section: str
    name: str
    kind: type
    choices: Collection[str]
    optional: bool
    default: object
    help: str

    @property
    def flag(self) -> str:
        """Name on the command line, e.g. `--micro-batch-size`."""
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        text = "one of " + ", ".join(self.choices) if self.choices else _EXPECTED[self.kind]
        return f"{text} (or null)" if self.optional else text


def section_types() -> dict[str, type]:
    """The dataclass of each section: first those of `RunConfig` in its order, then those of the stages."""
    common = _sections_of_every_run()
    own = {name: kind for spec in stages().values() for name, kind in spec.settings.items()}
    assert not own.keys() & common.keys(), (
        f"a stage has a section of a name that is taken: {own.keys() & common.keys()}"
    )
    return common | own


@functools.cache
def _sections_of_every_run() -> dict[str, type]:
    hints = typing.get_type_hints(RunConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(RunConfig) if field.name not in _NO_SECTION}


def section_help(section: str) -> str:
    """The subject of a section on one line: the docstring of its dataclass."""
    return " ".join((section_types()[section].__doc__ or "").split())


@functools.cache
def section_fields(section: str) -> tuple[FieldSpec, ...]:
    """The settings of a section, in the order of their declaration."""
    cls = section_types()[section]
    hints = typing.get_type_hints(cls)
    docs = _attribute_docstrings(cls)
    specs = []
    for field in dataclasses.fields(cls):
        kind, choices, optional = _read_type(hints[field.name])
        specs.append(
            FieldSpec(
                section=section,
                name=field.name,
                kind=kind,
                choices=field.metadata.get("choices", choices),
                optional=optional,
                default=field.default,
                help=docs[field.name],
            )
        )
    return tuple(specs)


def all_fields() -> dict[str, FieldSpec]:
    """All settings of all sections by name; names are unique over all sections."""
    return _all_fields(tuple(section_types()))


@functools.cache
def _all_fields(sections: tuple[str, ...]) -> dict[str, FieldSpec]:
    specs: dict[str, FieldSpec] = {}
    for section in sections:
        for spec in section_fields(section):
            assert spec.name not in specs, f"{spec.name} is in {section} and in {specs[spec.name].section}"
            specs[spec.name] = spec
    return specs


def stage_fields(stage: str) -> dict[str, FieldSpec]:
    """The settings that a stage accepts, by name.

    Raises:
        ConfigError: there is no such stage.
    """
    sections = stage_spec(stage).all_sections
    return {name: spec for name, spec in all_fields().items() if spec.section in sections}


def convert(spec: FieldSpec, value: object, origin: str) -> object:
    """`value` as the field's type. The field decides how text is read: `1e-5` is a number, though not for YAML.

    Args:
        spec: the field.
        value: text from YAML or the command line, a value that has its type already, or None.
        origin: where the value was set, for the error.

    Raises:
        ConfigError: the value is not of the field's type or not one of its choices.
    """
    if value is None and spec.optional:
        return None
    converted = _parse_text(spec, value) if isinstance(value, str) else _check_type(spec, value)
    if converted is None:
        hint = did_you_mean(value, spec.choices) if isinstance(value, str) else ""
        shown = "null" if value is None else repr(value)
        raise ConfigError(f"{spec.name}={shown} ({origin}): expected {spec.expected}{hint}")
    return converted


def _parse_text(spec: FieldSpec, text: str) -> object | None:
    """The text as the field's type; None where it cannot be read as that."""
    if spec.choices:
        return text if text in spec.choices else None
    if spec.kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if spec.kind is str:
        # No name of a file can hold that character.
        return text if text and "\0" not in text else None
    try:
        number = spec.kind(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _check_type(spec: FieldSpec, value: typing.Any) -> object | None:
    """A value that is not text, as the field's type (an integer is also a float); None where it has another type."""
    if spec.kind is float and type(value) in (int, float):
        return float(value) if math.isfinite(value) else None
    return value if type(value) is spec.kind else None


def _read_type(hint: object) -> tuple[type, tuple[str, ...], bool]:
    """(kind, choices, optional) of an annotation such as `int`, `float | None` or `Literal["a", "b"] | None`."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        optional = True
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint), optional
    assert hint in _EXPECTED, f"no configuration field can have the type {hint}"
    return hint, (), optional


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, which is its help text."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in itertools.pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[ast.unparse(statement.target)] = " ".join(ast.literal_eval(following.value).split())
    return docs
