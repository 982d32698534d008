"""The option tables of docs/configuration.md, made from the dataclasses.

    python -m megatron_brain.config.reference docs/configuration.md

rewrites the part of the file between the two markers; a test compares it with the dataclasses.
"""

import sys
from pathlib import Path

from megatron_brain.config.fields import FieldSpec, section_fields, section_help, section_types
from megatron_brain.config.stage_spec import stages
from megatron_brain.errors import ConfigError

BEGIN = "<!-- options: begin (python -m megatron_brain.config.reference docs/configuration.md) -->"
END = "<!-- options: end -->"


def option_tables() -> str:
    """A Markdown table for each section (flag, type, default, meaning), and the stages that read it."""
    parts = []
    for section in section_types():
        readers = ", ".join(name for name, spec in stages().items() if section in spec.all_sections)
        head = "| flag | type | default | meaning |\n|---|---|---|---|\n"
        rows = "\n".join(map(_row, section_fields(section)))
        parts.append(f"### {section}\n\n{section_help(section)} Stages: {readers}.\n\n{head}{rows}")
    return "\n\n".join(parts)


def replace_tables(text: str) -> str:
    """The text of the page with its tables replaced.

    Raises:
        ConfigError: the page lacks a marker.
    """
    for marker in (BEGIN, END):
        if marker not in text:
            raise ConfigError(f"marker {marker!r} is missing")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{option_tables()}\n\n{END}{after}"


def _row(spec: FieldSpec) -> str:
    flag = f"`{spec.flag}`, `--no-{spec.flag[2:]}`" if spec.kind is bool else f"`{spec.flag}`"
    kind = ", ".join(f"`{choice}`" for choice in spec.choices) if spec.choices else spec.kind.__name__
    default = "" if spec.default is None else f"`{str(spec.default).lower() if spec.kind is bool else spec.default}`"
    return f"| {flag} | {kind} | {default} | {spec.help.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(replace_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
