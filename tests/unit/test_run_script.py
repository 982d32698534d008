"""tests/run.sh finds the Python that it was asked for, or says that there is none; its versions are pinned."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "run.sh"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """First on PATH; its python3.99 is a shim that does not run, as pyenv's is where that version is not chosen."""
    write_program(tmp_path / "python3.99", "exit 127")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("VENV", raising=False)
    return tmp_path


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run():
    command = ["bash", RUN, "--python", "3.99"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_python_that_does_not_run_is_none_and_the_suite_counts_as_skipped(folder):
    write_program(folder / "pyenv", "exit 1")
    result = run()
    assert result.returncode == 77
    assert "no python3.99 runs here" in result.stderr


def test_the_version_that_pyenv_has_gets_an_environment_of_its_own(folder):
    python = folder / "the_one_that_runs"
    write_program(python, f'echo "$@" >> {folder}/asked; [ "$1" = -c ]')
    write_program(folder / "pyenv", f"echo {python}")
    result = run()
    assert result.returncode == 1  # It makes no environment.
    assert (folder / "asked").read_text().splitlines()[-1] == "-m venv .venv-3.99"


def test_what_is_pinned_for_the_one_python_is_pinned_for_the_other():
    oldest, newest = (
        {line.partition("==")[0] for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")}
        for name in ("constraints-cpu.txt", "constraints-cpu-3.12.txt")
    )
    assert oldest - newest == set()
