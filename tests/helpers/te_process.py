"""Runs scripts of tests/te in separate processes, where Transformer Engine's Python runs on a CPU (te/fake_te.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]

needs_te = pytest.mark.skipif(
    "TE_ON_CPU" not in os.environ, reason="TE_ON_CPU names no folder with Transformer Engine's Python"
)


def run_with_te(script: str, *arguments: object, processes: int = 1, timeout: int = 300, **options: object):
    """Run tests/te/`script`, with several processes under torchrun. `options` go to subprocess.run."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([os.environ["TE_ON_CPU"], str(_TESTS), str(_TESTS.parent)])
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), _TESTS / "te" / script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        timeout=timeout,
        **options,
    )
