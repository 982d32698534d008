"""The Dockerfile, as far as it can be looked at without a Docker daemon: it has not been built here."""

import fnmatch
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_brain import __version__

ROOT = Path(__file__).parents[2]
INSTRUCTION = re.compile(r"^([A-Z]+) (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def dockerfile():
    return (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def instructions(dockerfile):
    """Pairs of an instruction and its arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE)
    return INSTRUCTION.findall(re.sub(r"\\\n\s*", "", text))


@pytest.fixture(scope="module")
def install():
    return runpy.run_path(str(ROOT / "tools/install.py"))


def hadolint(text):
    program = Path(sys.executable).with_name("hadolint")
    assert program.is_file(), "pip install -e .[test] brings hadolint"
    result = subprocess.run([program, "--no-color", "-"], input=text, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def test_it_passes_hadolint_with_no_rule_ignored(dockerfile):
    assert hadolint(dockerfile) == (0, "")
    assert "hadolint ignore" not in dockerfile and not list(ROOT.glob(".hadolint.*"))


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("pytorch:${NGC_TAG}", "pytorch", "DL3006"),
        ("WORKDIR /opt/megatron_brain", "WORKDIR megatron_brain", "DL3000"),
        ("USER ${USER_ID}", "USER root", "DL3002"),
        ("python tools/check_imports.py", "pip install apex", "DL3013"),
    ],
)
def test_hadolint_finds_what_is_broken(dockerfile, right, wrong, rule):
    assert right in dockerfile
    status, report = hadolint(dockerfile.replace(right, wrong))
    assert status == 1 and rule in report


def test_the_base_image_has_its_megatron_core_among_the_tested_ones(instructions, install):
    default = dict(argument.split("=", 1) for name, argument in instructions if name == "ARG" and "=" in argument)
    assert ("FROM", "nvcr.io/nvidia/pytorch:${NGC_TAG}") in instructions
    pairs = install["NGC_MEGATRON_CORE"]
    tested = {file.name: install["read_pins"](file)["megatron-core"] for file in ROOT.glob("constraints-cpu*.txt")}
    assert pairs[default["NGC_TAG"]] == tested["constraints-cpu-3.12.txt"]
    assert set(pairs.values()) <= set(tested.values())


def test_it_runs_the_script_that_ci_ran_to_install(instructions):
    installing = [argument for name, argument in instructions if name == "RUN" and "install.py" in argument]
    assert len(installing) == 1 and "--ngc-image" in installing[0]
    assert "python tools/install.py " in (ROOT / "tools/environment.sh").read_text()
    assert "source tools/environment.sh" in (ROOT / "tests/run.sh").read_text()
    assert not any("pip install" in argument for _, argument in instructions)


def test_the_images_own_pins_are_lifted_before_anything_is_installed(instructions):
    first_run = [name for name, _ in instructions].index("RUN")
    assert instructions.index(("ENV", "PIP_CONSTRAINT=")) < first_run


def test_the_last_user_is_a_number_other_than_root(instructions):
    assert [argument for name, argument in instructions if name == "USER"] == ["${USER_ID}"]
    user = next(argument for name, argument in instructions if argument.startswith("USER_ID="))
    assert int(user.removeprefix("USER_ID=")) > 0
    # Nothing after it needs root.
    assert "RUN" not in [name for name, _ in instructions[instructions.index(("USER", "${USER_ID}")) :]]


def copied_first(instructions):
    """Arguments of the COPY instructions before the first RUN."""
    first_run = [name for name, _ in instructions].index("RUN")
    return [argument.split() for name, argument in instructions[:first_run] if name == "COPY"]


def test_what_is_copied_before_the_sources_is_all_that_setup_py_reads(instructions, tmp_path):
    for *files, folder in copied_first(instructions):
        for file in files:
            target = tmp_path / folder / Path(file).name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((ROOT / file).read_bytes())
    command = [sys.executable, "setup.py", "--quiet", "--name", "--version"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["megatron_brain", __version__]


def test_every_file_that_is_copied_reaches_the_build(instructions):
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    sent = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert all((ROOT / path).exists() for path in sent)
    for *files, _ in copied_first(instructions):
        for file in files:
            assert any(fnmatch.fnmatch(file, path) or file.startswith(f"{path}/") for path in sent), file
    assert {"megatron_brain", "tools", "examples"} <= set(sent)


def test_the_check_after_the_build_imports_every_module(capsys):
    runpy.run_path(str(ROOT / "tools/check_imports.py"))["main"]()
    printed = capsys.readouterr().out
    modules = list((ROOT / "megatron_brain").rglob("*.py"))
    assert f"{len(modules) - 1} modules" in printed and "megatron-core" in printed
