"""Why Transformer Engine cannot be used is told, and a broken one keeps nothing else from being imported."""

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_brain.runtime import transformer_engine

META_PACKAGE = "raise RuntimeError('Found empty `transformer-engine` meta package installed.\\nInstall ...')"
FOUND = {
    "transformer_engine is not installed": None,
    "transformer_engine is installed but cannot be imported (RuntimeError: Found empty `transformer-engine` meta "
    "package installed.)": {"__init__.py": META_PACKAGE},
    "transformer_engine is installed but cannot be imported (FileNotFoundError: Could not find shared object file)": {
        "__init__.py": "__version__ = '2.20.2'",
        "pytorch.py": "raise FileNotFoundError('Could not find shared object file')",
    },
    "transformer_engine 2.3.0+5fdd7bb is older than 2.9": {
        "__init__.py": "__version__ = '2.3.0+5fdd7bb'",
        "pytorch.py": "",
    },
    None: {"__init__.py": "__version__ = '2.16.0'", "pytorch.py": ""},
}


def install(folder, files):
    package = folder / "transformer_engine"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text)


def take_out():
    """What has been imported of Transformer Engine, out of the interpreter's modules."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "transformer_engine"}


@pytest.fixture
def nothing_imported():
    """Nor is anything that the test imports left behind."""
    before = take_out()
    yield
    take_out()
    sys.modules.update(before)


@pytest.mark.parametrize("problem", FOUND)
def test_the_reason_is_told(problem, tmp_path, monkeypatch, nothing_imported):
    if FOUND[problem] is not None:
        install(tmp_path, FOUND[problem])
    elif importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed")
    monkeypatch.syspath_prepend(tmp_path)
    assert transformer_engine.problem.__wrapped__() == problem


def test_a_broken_one_does_not_keep_megatron_core_from_importing(tmp_path):
    install(tmp_path, {"__init__.py": META_PACKAGE})
    code = """
        import sys
        from megatron_brain.runtime import transformer_engine
        assert "cannot be imported" in transformer_engine.problem()
        assert "megatron.core" not in sys.modules
        from megatron.core import fp8_utils
        assert not fp8_utils.HAVE_TE
    """
    path = [str(tmp_path), *filter(None, sys.path)]
    run = f"import sys; sys.path[:0] = {path!r}\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_cpu_has_no_compute_capability():
    assert transformer_engine.capability(torch.device("cpu")) is None


def test_the_version_of_cuda_is_two_numbers(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert transformer_engine.cuda_version() == (12, 9)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert transformer_engine.cuda_version() is None
