"""Whether Transformer Engine can be used in this process, and what the device and CUDA can do in FP8."""

import functools
import importlib
import importlib.util
import sys
import warnings
from typing import Any

import torch

OLDEST = (2, 9)
"""The version that megatron-core 0.16, our oldest, is developed with. It has all recipes of FP8, custom ones too."""

CURE = "use --transformer-impl local, or pip install '.[gpu]' beside a torch for CUDA"


@functools.cache
def problem() -> str | None:
    """Why Transformer Engine cannot be used here, or None. The first call's answer is kept.

    Call this before megatron-core is imported. megatron-core understands an ImportError as "not installed" and fails
    at any other error; an installation that raises one is hidden from it.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    try:
        with warnings.catch_warnings():
            # It warns that it found no extension; the import of its modules below fails then.
            warnings.simplefilter("ignore")
            module = importlib.import_module("transformer_engine")
            importlib.import_module("transformer_engine.pytorch")
    except (
        Exception
    ) as error:  # Any type is possible: a bare metapackage raises RuntimeError, a missing library OSError.
        _hide()
        return f"transformer_engine is installed but cannot be imported ({type(error).__name__}: {_first_line(error)})"
    if _major_minor(module.__version__) < OLDEST:
        return f"transformer_engine {module.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
    return None


def version() -> str:
    """Version of the Transformer Engine that is installed."""
    found: str = importlib.import_module("transformer_engine").__version__
    return found


def _hide() -> None:
    """Make `import transformer_engine` raise the ImportError of a package that is not there."""
    modules: dict[str, Any] = sys.modules
    for name in [name for name in modules if name.partition(".")[0] == "transformer_engine"]:
        del modules[name]
    modules["transformer_engine"] = None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of the device; None if it is not a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def cuda_version() -> tuple[int, int] | None:
    """Version of CUDA that torch was built for; None if it was built without CUDA."""
    return None if torch.version.cuda is None else _major_minor(torch.version.cuda)


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
