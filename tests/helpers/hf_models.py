"""Tiny random models of every Hugging Face family. Their weights are large, so no results agree only by being small."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

_LLAMA_LIKE = {
    "vocab_size": 330,  # not a multiple of 128: the last rows of our embedding are padding
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}

HF_MODELS: dict[str, dict] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE},
    "llama3": {"model_type": "llama", **_LLAMA_LIKE, "rope_parameters": _LLAMA_3_ROPE},
    "mistral": {"model_type": "mistral", **_LLAMA_LIKE, "head_dim": 12, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", **_LLAMA_LIKE},
    "qwen3": {"model_type": "qwen3", **_LLAMA_LIKE, "head_dim": 12},
    "phi3": {"model_type": "phi3", **_LLAMA_LIKE, "partial_rotary_factor": 0.5},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 330,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 64,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 330,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "gpt_neox_serial": {
        "model_type": "gpt_neox",
        "vocab_size": 330,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "use_parallel_residual": False,
        "hidden_act": "gelu_new",
    },
}
"""Values of config.json for a tiny model of each family. EOS is 1, padding 0. Layouts of up to 4 ranks divide it."""


def build_hf_model(
    name: str, head: str = "policy", *, seed: int = 3, std: float = 0.2, **changes: object
) -> PreTrainedModel:
    """A model of HF_MODELS in float32: weights, biases and norms are all random.

    Args:
        head: `policy` (causal language model) or `reward` (classifier with one label).
        std: standard deviation of the weights and biases, except the weights of norms.
        changes: other values of config.json.
    """
    torch.manual_seed(seed)
    labels = {"num_labels": 1} if head == "reward" else {}
    config = AutoConfig.for_model(**HF_MODELS[name] | _IDS | labels | changes)
    auto = AutoModelForCausalLM if head == "policy" else AutoModelForSequenceClassification
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = any(part in key for part in ("norm", ".ln_"))
            if is_norm and key.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=std)
    return model


def write_hf_model(directory: Path, name: str, head: str = "policy", **options: object) -> Path:
    """Save the model of `build_hf_model`; returns the directory."""
    build_hf_model(name, head, **options).save_pretrained(directory)
    return directory
