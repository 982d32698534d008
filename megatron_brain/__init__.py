"""Post-training of megatron-core GPT models: supervised fine-tuning, reward models and BRAIn."""

import logging
import warnings

from megatron_brain import stages as stages  # registers them, without torch

__version__ = "0.1.0"

# Of the libraries' own making, when they are imported and at every checkpoint, and nothing a user could act on: which
# implementation of the layers runs, and why, is logged.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated", module="megatron.core")
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
warnings.filterwarnings("ignore", message="MimoModelConfig is experimental")
# One warning, of every GPTModel: megatron-core 0.19 calls the class deprecated.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
