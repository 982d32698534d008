"""Finds the tokenizer of a run: with its checkpoint, with its Hugging Face model, or where the user says."""

from megatron_brain.checkpointing.folders import CheckpointInfo
from megatron_brain.config.data import TokenizerConfig
from megatron_brain.errors import ConfigError


def locate_tokenizer(
    asked: TokenizerConfig, start_from: CheckpointInfo | None, hf_model: str | None
) -> tuple[str, str]:
    """Type and place of the tokenizer that is asked for, or else the checkpoint's, or the Hugging Face model's.

    Raises:
        ConfigError: none of the three is given.
    """
    if asked.tokenizer_model is not None:
        return asked.tokenizer_type, asked.tokenizer_model
    if start_from is not None:
        return start_from.tokenizer_type, str(start_from.tokenizer_dir)
    if hf_model is not None:
        return "HuggingFaceTokenizer", hf_model
    raise ConfigError("no tokenizer: give --tokenizer-model, or --load or --hf-model which bring one")
