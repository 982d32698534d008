"""The small files of a Hugging Face directory that is written: config.json and the index of the weights."""

import json
from collections.abc import Mapping

import torch
import transformers

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.family import Family
from megatron_brain.data.tokenizer import Tokenizer


def hf_config(family: Family, model: ModelConfig, head: Head, dtype: torch.dtype, tokenizer: Tokenizer) -> dict:
    """The contents of config.json.

    Raises:
        ConfigError: a model of this family cannot have this architecture.
    """
    is_policy = head == "policy"
    reward = {"problem_type": "regression", "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return {
        "architectures": [family.policy_class if is_policy else family.reward_class],
        **family.hf_config(model),
        # This is transformers 4's name, and transformers 5 reads it as well.
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Some versions take a model without this key for an old one.
        "transformers_version": transformers.__version__,
        **({} if is_policy else reward),
        **special_ids(tokenizer),
    }


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of config.json and generation_config.json that mean no text."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def index_json(metadata: Mapping[str, object], file_of: Mapping[str, str]) -> str:
    """The text of the index.

    Args:
        metadata: holds `total_size`, the bytes of all tensors.
        file_of: the file of each tensor, by names.
    """
    return json.dumps({"metadata": metadata, "weight_map": file_of}, indent=2, sort_keys=True) + "\n"


def as_json(values: dict) -> str:
    """The text of a file of settings."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
