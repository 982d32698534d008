"""Keeps out of a run's log what libraries say that nobody can act on. Imports no library, so that it can come first."""

import logging
import os
import sys
import warnings
from typing import TextIO

from megatron_brain.runtime.launch import is_reporting_rank

_NOISE = (
    "(Transformer Engine and )?Apex (is|are) not installed",  # Which layers run, and why, is in the banner.
    "MimoModelConfig is experimental",
    "full scope is deprecated",
    "Please use DTensor instead",
    r"`torch\.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "If you are using transformer_engine as the transformer implementation, the core_attn",
)
"""How warnings begin that megatron-core raises, or makes torch raise, by the way it is written."""

_CUDA_ALONE = "When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS"

_PROGRESS_BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Variables by which datasets, huggingface_hub and transformers draw none."""


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment: a live display takes its place and shows lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def ignore_known_warnings() -> None:
    """Leave out warnings of libraries at their import and in every step that are about their own code."""
    for start in _NOISE:
        warnings.filterwarnings("ignore", message=start)
    # One warning, of every GPTModel: megatron-core 0.19 calls the class deprecated.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


def ignore_advice_for_cuda() -> None:
    """Leave out advice that a machine without CUDA cannot use."""
    warnings.filterwarnings("ignore", message=_CUDA_ALONE)


def set_up_console() -> None:
    """For a run: messages of this package and warnings of libraries on the reporting rank, errors on all; no progress
    bars of libraries, unless their variables ask for them.

    To be called before a library is imported that reads such a variable then.
    """
    for name in _PROGRESS_BARS:
        os.environ.setdefault(name, "1")
    reports = is_reporting_rank()
    level = logging.WARNING if reports else logging.ERROR
    logging.basicConfig(level=level, handlers=[_Stderr()], format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_brain").setLevel(logging.INFO if reports else logging.ERROR)
    if not reports:
        # All ranks run the same code: what it warns of, the reporting rank says.
        warnings.simplefilter("ignore")
