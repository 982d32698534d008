"""Keeps messages of libraries that nobody can act on out of a run's log. It imports no library, so it can run first."""

import logging
import os
import sys
import warnings
from typing import TextIO

from megatron_brain.runtime.launch import is_reporting_rank

_NOISE = (
    "(Transformer Engine and )?Apex (is|are) not installed",  # The banner says which layers run, and why.
    "MimoModelConfig is experimental",
    "full scope is deprecated",
    "Please use DTensor instead",
    r"`torch\.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "If you are using transformer_engine as the transformer implementation, the core_attn",
)
"""Beginnings of warnings that are about the code of megatron-core: it raises them, or makes torch raise them."""

_CUDA_ALONE = "When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS"

_PROGRESS_BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Variables that, set to 1, make datasets, huggingface_hub and transformers draw none."""


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`: a live display replaces that stream and shows lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def ignore_known_warnings() -> None:
    """Leave out warnings that libraries raise, at their import and in every step, about their own code."""
    for start in _NOISE:
        warnings.filterwarnings("ignore", message=start)
    # Every new GPTModel warns once: megatron-core 0.19 calls the class deprecated.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


def ignore_advice_for_cuda() -> None:
    """Leave out advice that a machine without CUDA cannot use."""
    warnings.filterwarnings("ignore", message=_CUDA_ALONE)


def set_up_console() -> None:
    """Set up what a run prints. The reporting rank prints messages of this package and warnings of libraries; all
    ranks print errors. Libraries draw no progress bars, unless their variables ask for them.

    Call this before the libraries are imported: they read those variables at their import.
    """
    for name in _PROGRESS_BARS:
        os.environ.setdefault(name, "1")
    reports = is_reporting_rank()
    level = logging.WARNING if reports else logging.ERROR
    logging.basicConfig(level=level, handlers=[_Stderr()], format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_brain").setLevel(logging.INFO if reports else logging.ERROR)
    if not reports:
        # All ranks run the same code, so the reporting rank shows the same warnings.
        warnings.simplefilter("ignore")
