"""Every distributed case as a test of its own; the worlds behind them are started once a session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.assets import write_assets

from distributed.world import LAYOUTS, case_names

_WORLD = Path(__file__).parent / "world.py"
_TIMEOUT_SECONDS = 420


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, str | None]:
    """Error of every case, None where it passed; a case of a world that died is missing."""
    directory = tmp_path_factory.mktemp("distributed")
    write_assets(directory)
    collected: dict[str, str | None] = {}
    for size in LAYOUTS:
        path = directory / f"results_{size}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        world = subprocess.run(
            [*command, str(_WORLD), "--assets", str(directory), "--results", str(path)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if path.exists():
            collected |= json.loads(path.read_text())
        if world.returncode:
            collected[f"world of {size}"] = world.stderr[-5000:]
    return collected


@pytest.mark.parametrize("name", case_names())
def test_case(results: dict[str, str | None], name: str) -> None:
    if name not in results:
        died = "\n".join(error for key, error in results.items() if key.startswith("world of"))
        pytest.fail(f"{name} did not run\n{died}")
    if results[name] is not None:
        pytest.fail(results[name], pytrace=False)
