"""What FP8 remembers from one pass to the next, with Transformer Engine's own layers and recipes on a CPU.

Its Python runs in separate processes over a fake of the compiled extension, as for test_checkpoints.py, which says
what TE_ON_CPU must be. The properties are the functions `case_*` of fp8_state.py.
"""

import json
import re
from pathlib import Path

import pytest
from helpers.te_process import needs_te, run_with_te

pytestmark = needs_te

CASES = re.findall(r"^def (case_\w+)", Path(__file__).with_name("fp8_state.py").read_text(), re.MULTILINE)
LAYOUTS = {"one_process": 1, "tp2_sp": 2}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Tracebacks by layout, rank and case. The second layout reads what the first has written."""
    folder, found = tmp_path_factory.mktemp("fp8_state"), {}
    for layout, processes in LAYOUTS.items():
        run_with_te("fp8_state.py", folder, processes=processes, timeout=900)
        files = [folder / f"failures_{rank}.json" for rank in range(processes)]
        found[layout] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_fp8_state(failures, case, layout):
    for rank, failed in enumerate(failures[layout]):
        assert case not in failed, f"rank {rank}: {failed[case]}"
