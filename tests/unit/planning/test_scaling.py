"""docs/scaling.md shows what the planner says."""

import re
from pathlib import Path

import pytest
from planner_study import scaling

from megatron_brain.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"


@pytest.fixture
def made(monkeypatch):
    """Stands for the tables: what is searched takes long."""
    monkeypatch.setattr(scaling, "TABLES", {name: lambda name=name: f"| {name} |" for name in scaling.TABLES})


def test_every_table_is_between_its_markers_and_no_other_is(made):
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"<!-- (\w+): begin -->", text) == re.findall(r"<!-- (\w+): end -->", text)
    assert sorted(re.findall(r"<!-- (\w+): begin -->", text)) == sorted(scaling.TABLES)
    replaced = scaling.replace_tables(text)
    for name in scaling.TABLES:
        assert f"<!-- {name}: begin -->\n| {name} |\n<!-- {name}: end -->" in replaced
    between = re.compile(r"(<!-- \w+: begin -->).*?(<!-- \w+: end -->)", re.DOTALL)
    assert between.sub(r"\1\2", replaced) == between.sub(r"\1\2", text), "text between the tables is kept"


def test_a_page_without_a_marker_is_refused(made):
    with pytest.raises(ConfigError, match="'<!-- weak: end -->' are missing"):
        scaling.replace_tables(PAGE.read_text(encoding="utf-8").replace("<!-- weak: end -->", ""))


def test_the_page_shows_the_table_of_strong_scaling():
    """One of four: the others search for longer."""
    shown = f"<!-- strong: begin -->\n{scaling.strong_scaling()}\n<!-- strong: end -->"
    assert shown in PAGE.read_text(encoding="utf-8"), (
        "run: PYTHONPATH=tools python -m planner_study.scaling docs/scaling.md"
    )
