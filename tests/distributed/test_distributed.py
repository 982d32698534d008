"""Every distributed case is a test. The worlds that run the cases start once per session."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.assets import write_assets

from distributed.world import LAYOUTS, case_names

_WORLD = Path(__file__).parent / "world.py"
_TIMEOUT_SECONDS = 1800
_NAMES = {size: case_names(size) for size in LAYOUTS}


@pytest.fixture(scope="session")
def results(request, tmp_path_factory) -> dict[str, str | None]:
    """Error of every selected case, None if it passed. Cases of a world that died are missing."""
    directory = tmp_path_factory.mktemp("distributed")
    write_assets(directory)
    selected = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)}
    # One process runs every case that any world runs, because it writes what the others compare with.
    cases = {name.split("-", 2)[2] for name in selected}
    collected: dict[str, str | None] = {}
    for size, names in _NAMES.items():
        chosen = [name for name in names if (name.split("-", 2)[2] in cases if size == 1 else name in selected)]
        if chosen:
            collected |= _run_world(size, chosen, directory)
    return collected


def _run_world(size: int, names: list[str], directory: Path) -> dict[str, str | None]:
    path = directory / f"results_{size}.json"
    world = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)),
            *(str(_WORLD), "--assets", str(directory), "--results", str(path)),
            *("--only", f"^({'|'.join(map(re.escape, names))})$"),
        ],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    results = json.loads(path.read_text()) if path.exists() else {}
    if world.returncode:
        results[f"world of {size}"] = world.stderr[-5000:]
    return results


@pytest.mark.parametrize("name", [name for names in _NAMES.values() for name in names])
def test_case(results: dict[str, str | None], name: str) -> None:
    if name not in results:
        died = "\n".join(error for key, error in results.items() if key.startswith("world of"))
        pytest.fail(f"{name} did not run\n{died}")
    if results[name] is not None:
        pytest.fail(results[name], pytrace=False)
