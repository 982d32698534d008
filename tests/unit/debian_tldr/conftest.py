"""The scripts of the example, importable."""

import importlib
import sys
from types import SimpleNamespace

import pytest
from helpers.debian_tldr import EXAMPLE
from helpers.experiments import StubPlans, importable


@pytest.fixture(scope="module")
def example():
    """The example's modules; they are scripts in a folder, importable only while it is on the path."""
    names = (
        "user_errors",
        "descriptions",
        "wheels",
        "judge",
        "fetch_data",
        "fetch_model",
        "make_preferences",
        "summary",
        "fetch_judge",
        "best_of_n",
        "split_data",
    )
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def modules():
    with importable() as found:
        found.execute.POLL_SECONDS = 0.01
        # git takes longer than the stubs do.
        current = found.versions.versions()
        found.state.versions = lambda: current
        yield found


@pytest.fixture
def stub(modules, tmp_path):
    return StubPlans(modules, tmp_path / "work")
