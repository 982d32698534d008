"""What libraries say that nobody can act on stays out of a run's log, and nothing else does."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from megatron_brain.runtime import quiet

KNOWN = [
    "Apex is not installed. Falling back to Torch Norm",
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
    "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.",
]
ADVICE = "When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS"


def heard(*messages):
    """Those of the messages that are shown when they are warned of."""
    with warnings.catch_warnings(record=True) as caught:
        for message in messages:
            warnings.warn(message, FutureWarning, stacklevel=1)
    return [str(warning.message) for warning in caught]


@pytest.fixture
def fresh(monkeypatch):
    """Warnings and logging as in a new process."""
    for name in quiet._PROGRESS_BARS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    root, package = logging.getLogger(), logging.getLogger("megatron_brain")
    before = root.level, package.level
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield
    root.level, package.level = before


def test_only_known_warnings_are_left_out(fresh):
    others = ["the loss is odd", "something is deprecated", "torch.foo is deprecated", ADVICE]
    quiet.ignore_known_warnings()
    assert heard(*KNOWN, *others) == others
    quiet.ignore_advice_for_cuda()
    assert heard(*others) == others[:-1]


@pytest.mark.parametrize("rank", [0, 3])
def test_the_reporting_rank_speaks_and_the_others_tell_errors_alone(rank, fresh, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own, beside which ours would not be made
    quiet.set_up_console()
    ours, library = logging.getLogger("megatron_brain.training"), logging.getLogger("library")
    for logger, name in ((ours, "ours"), (library, "library")):
        logger.info("%s: news", name)
        logger.warning("%s: a warning", name)
        logger.error("%s: an error", name)
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    errors = ["ours: an error", "library: an error"]
    assert said == (errors if rank else ["ours: news", "ours: a warning", errors[0], "library: a warning", errors[1]])
    assert heard("the loss is odd") == ([] if rank else ["the loss is odd"])


@pytest.mark.parametrize("asked", [None, "0"])
def test_libraries_draw_no_progress_bars_unless_their_variable_asks_for_them(asked, tmp_path):
    code = (
        "import sys\n"
        "from megatron_brain.runtime import quiet\n"
        "quiet.set_up_console()\n"
        "import datasets\n"
        "datasets.load_dataset('json', data_files=sys.argv[1], cache_dir=sys.argv[2])\n"
    )
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    env = {name: value for name, value in os.environ.items() if name not in quiet._PROGRESS_BARS}
    env |= {"HF_HUB_OFFLINE": "1"} | ({quiet._PROGRESS_BARS[0]: asked} if asked else {})
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ("Generating train split" in done.stderr) == (asked is not None)
    assert asked or not done.stderr
