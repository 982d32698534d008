"""Post-training of megatron-core GPT models: supervised fine-tuning, reward models and BRAIn."""

from megatron_brain import stages as stages  # registers them, without torch
from megatron_brain.runtime import quiet

__version__ = "0.1.0"

quiet.ignore_known_warnings()
