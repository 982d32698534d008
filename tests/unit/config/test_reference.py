"""docs/configuration.md lists exactly the options there are."""

from pathlib import Path

import pytest

from megatron_brain.config.fields import all_fields
from megatron_brain.config.reference import option_tables, replace_tables
from megatron_brain.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_what_the_dataclasses_generate():
    text = PAGE.read_text(encoding="utf-8")
    assert replace_tables(text) == text, "run: python -m megatron_brain.config.reference docs/configuration.md"


def test_every_flag_and_its_help_text_are_in_the_tables():
    tables = option_tables()
    for spec in all_fields().values():
        assert f"| `{spec.flag}`" in tables
        assert spec.help.replace("|", "\\|") in tables
    assert sum(line.startswith("| `--") for line in tables.splitlines()) == len(all_fields())


def test_a_page_without_markers_is_refused():
    with pytest.raises(ConfigError, match="options: begin"):
        replace_tables("no markers")
