"""The documentation: its links lead somewhere, the files it names are there, and its site builds without a warning."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
PACKAGES = {path.parent.name for path in (ROOT / "megatron_brain").glob("*/__init__.py")}

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:megatron_brain|tools|tests|examples|docs|\.ci)/[\w./-]*\w)`")


def prose(page):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    texts = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def dead_links(page):
    """Links of a page within the repository that lead nowhere."""
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_page_and_a_heading_that_are_there(page):
    assert dead_links(page) == []


def test_a_link_to_a_page_or_heading_that_is_not_there_is_dead(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading: (`a_b`)\n[a](#one-heading-a_b) [b](#two) [c](page.md#one-heading-a_b) [d](other.md)\n"
    )
    assert dead_links(page) == ["#two", "other.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_page_names_is_there(page):
    named = NAMED_FILE.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(name))] == []


def unknown_modules(page):
    """Dotted names that begin with a package of ours and are no module of it."""
    packages = "|".join(sorted(PACKAGES))
    named = re.findall(rf"`(?:megatron_brain\.)?((?:{packages})(?:\.[a-z_]+)+)`", prose(page))
    places = {name: ROOT / "megatron_brain" / name.replace(".", "/") for name in named}
    files = {"jsonl", "json", "parquet", "arrow", "gz", "zst", "yaml"}  # data.jsonl is a file of records
    return [
        name
        for name, place in places.items()
        if name.split(".")[1] not in files and not place.is_dir() and not place.with_suffix(".py").exists()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_that_a_page_names_is_there(page):
    assert unknown_modules(page) == []


def map_of_the_code():
    """Package or module, and the modules that docs/extending.md names in its row."""
    section = (ROOT / "docs/extending.md").read_text(encoding="utf-8").split("## Packages")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+/?)` \|.*\| (.*) \|$", section, flags=re.MULTILINE)
    return {name: re.findall(r"`([\w/]+\.py)`", where) for name, where in rows}


def test_the_map_of_the_code_has_every_package_and_names_modules_that_are_there():
    rows = map_of_the_code()
    assert {name.removesuffix("/") for name in rows if name.endswith("/")} == PACKAGES
    files = [f"{name}{module}" for name, modules in rows.items() for module in modules] + [*rows]
    assert [file for file in files if not (ROOT / "megatron_brain" / file).exists()] == []


def test_the_order_of_the_layers_is_the_one_that_imports_keep_to():
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8").split("## Layers")[1].split("\n## ")[0]
    shown = re.findall(r"\w+", re.search(r"\n( {4}errors.*?)\n\n", text, flags=re.DOTALL)[1])
    assert tuple(shown) == runpy.run_path(str(ROOT / "tests/unit/test_layers.py"))["LAYERS"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_the_figure_of_the_quickstart_shows_the_numbers_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figure = (ROOT / "docs/figures/quickstart.svg").read_text(encoding="utf-8")
    ticks = set(re.findall(r'fill="#555">(\S+)</text>', figure))
    shown = set(re.findall(r"\b\d\.\d+\b", " ".join(re.findall(r">([^<]+)</text>", figure)))) - ticks
    assert {"0.567", "0.593"} <= shown
    assert {number for number in shown if number not in readme.partition("quickstart.svg)")[2]} == set()


def test_every_package_has_a_page_in_the_api_reference():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md")}
    assert set(pages) == {*PACKAGES, "package"}
    assert [name for name in PACKAGES if f"\n::: megatron_brain.{name}\n" not in pages[name]] == []


def test_the_site_builds_without_a_warning(tmp_path):
    program = Path(sys.executable).with_name("mkdocs")
    assert program.is_file(), "pip install -e .[docs] brings mkdocs"
    # mkdocs.yml makes warnings errors. The variable leaves out a note on the future of mkdocs-material.
    built = subprocess.run(
        [program, "build", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    page = (tmp_path / "site/api/objectives/index.html").read_text(encoding="utf-8")
    assert "posterior_log_weights" in page and "brain_loss_gradient" in page
