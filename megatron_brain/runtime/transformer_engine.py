"""Whether Transformer Engine can be used in this process, and what the device and CUDA are for FP8."""

import functools
import importlib
import importlib.util
import sys
import warnings
from typing import Any

import torch

OLDEST = (2, 9)
"""What megatron-core 0.16, the oldest we support, is developed with; it has all recipes of FP8, custom ones too."""

CURE = "use --transformer-impl local, or pip install '.[gpu]' beside a torch for CUDA"


@functools.cache
def problem() -> str | None:
    """Why Transformer Engine cannot be used here, or None. Looked at once.

    To be called before megatron-core is imported, which takes an ImportError for "not installed" and falls over
    whatever else a half installation raises: such a one is hidden from it.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    try:
        with warnings.catch_warnings():
            # That it found no extension; the import of its modules then says so.
            warnings.simplefilter("ignore")
            module = importlib.import_module("transformer_engine")
            importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # The bare metapackage raises a RuntimeError, a missing library an OSError, ...
        _hide()
        return f"transformer_engine is installed but cannot be imported ({type(error).__name__}: {_first_line(error)})"
    if _major_minor(module.__version__) < OLDEST:
        return f"transformer_engine {module.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
    return None


def version() -> str:
    """Of the Transformer Engine that can be imported."""
    found: str = importlib.import_module("transformer_engine").__version__
    return found


def _hide() -> None:
    """Have `import transformer_engine` raise the ImportError of a package that is not there."""
    modules: dict[str, Any] = sys.modules
    for name in [name for name in modules if name.partition(".")[0] == "transformer_engine"]:
        del modules[name]
    modules["transformer_engine"] = None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of the device; None: it is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def cuda_version() -> tuple[int, int] | None:
    """Version of CUDA that torch was built for; None: for none."""
    return None if torch.version.cuda is None else _major_minor(torch.version.cuda)


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
