"""A wheel, installed in a folder of its own and run from another one, has all that a checkout offers its users."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In one process, which imports torch once.
ALL_COMMANDS = """
import pkgutil, runpy, sys
from megatron_brain import commands
for module in pkgutil.iter_modules(commands.__path__):
    sys.argv = [module.name, "--help"]
    try:
        runpy.run_module(f"megatron_brain.commands.{module.name}", run_name="__main__")
    except SystemExit as stopped:
        print(f"{module.name} ended with {stopped.code}")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves build/ and an egg-info beside setup.py.
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "megatron_brain", folder / "megatron_brain", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "built", folder)
    return next((folder / "built").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-compile", "--target", folder, wheel)
    return folder


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run([*command, "--no-index", "--quiet"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def run(installed, tmp_path, *command):
    """Run what the wheel brought, where the checkout is not in reach."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_wheel_holds_every_module_the_mark_of_types_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_brain").rglob("*.py")}
    assert modules <= names
    assert {"megatron_brain/py.typed", "megatron_brain/stages/judging/default.jinja"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "tools", "examples"))]


def test_its_metadata_tell_what_a_package_index_shows(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
    told = Parser().parsestr(archive.read(metadata).decode())
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == ">=3.11"
    assert told.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_installed_package_is_the_one_that_runs(installed, tmp_path):
    result = run(installed, tmp_path, sys.executable, "-c", "import megatron_brain; print(megatron_brain.__file__)")
    assert result.stdout.strip() == str(installed / "megatron_brain" / "__init__.py"), result.stderr


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["megatron-brain", "--help"], "  brain "),
        (["megatron-brain", "brain", "--help"], "--reward-temperature"),
        (["megatron-brain-convert", "--help"], "  megatron-to-hf "),
        (["megatron-brain-convert", "hf-to-megatron", "--help"], "usage: megatron-brain-convert hf-to-megatron"),
    ],
)
def test_help_of_a_console_script(command, shown, installed, tmp_path):
    program, *arguments = command
    result = run(installed, tmp_path, installed / "bin" / program, *arguments)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout


@pytest.mark.parametrize(
    "command", [["megatron-brain", "sfd"], ["megatron-brain-convert", "sideways"], ["megatron-brain-convert"]]
)
def test_a_console_script_ends_with_2_where_it_does_not_know_what_was_asked_for(command, installed, tmp_path):
    program, *arguments = command
    result = run(installed, tmp_path, installed / "bin" / program, *arguments)
    assert result.returncode == 2
    assert "usage: " in result.stderr and all(argument in result.stderr for argument in arguments)
    assert not result.stdout


def test_every_command_prints_its_help(installed, tmp_path):
    result = run(installed, tmp_path, sys.executable, "-c", ALL_COMMANDS)
    modules = (ROOT / "megatron_brain" / "commands").glob("*.py")
    commands = {path.stem for path in modules if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert result.returncode == 0, result.stderr
    assert {name for name in commands if f"{name} ended with 0" in result.stdout} == commands
