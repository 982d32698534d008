"""The start of every test of the command line: no launcher, the assets, and an empty working directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import datasets
import huggingface_hub
import pytest

from bad_inputs.assets import Assets, write_assets
from bad_inputs.case import Site
from bad_inputs.running import LAUNCHER_VARIABLES, run_here, snapshot
from megatron_brain.runtime import parallel


@pytest.fixture(scope="package")
def alone() -> Iterator[pytest.MonkeyPatch]:
    """No launcher and no hub are set, and commands do not end the process groups of the test session."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(parallel, "stop", lambda: None)
        yield patch


@pytest.fixture(scope="package")
def assets(alone, single, tmp_path_factory) -> Iterator[Assets]:
    """The files from which bad inputs are made. Checks at the end that no case has changed them."""
    root = tmp_path_factory.mktemp("assets")

    def run(argv: list[str]) -> None:
        assert run_here(argv) == 0, argv

    made = write_assets(root, run)
    before = snapshot(root)
    yield made
    assert snapshot(root) == before


@pytest.fixture
def site(assets, tmp_path, monkeypatch) -> Iterator[Site]:
    """An empty folder, which is the working directory. Modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    yield Site(tmp_path, assets)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
