"""Finds the sizes of the model before anything is built: from a checkpoint, a Hugging Face folder or explicit flags."""

import dataclasses

from megatron_brain.config.model import ModelConfig

ARCHITECTURE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "norm_epsilon",
    "untie_embeddings_and_output_weights",
)
"""What a checkpoint fixes; every other field of ModelConfig is a choice of the run."""

_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


def resolve(requested: ModelConfig, found: dict | None, source: str) -> ModelConfig:
    """`requested` with its unset sizes filled from `found` (a checkpoint's or Hugging Face's), else by default.

    Raises:
        ValueError: a size was asked for that `source` contradicts, or one is missing.
    """
    sizes = {name: getattr(requested, name) for name in ARCHITECTURE_FIELDS}
    if found:
        # Checkpoints from before there was a choice do not say.
        found = {"position_embedding_type": "rope", **found}
    for name, value in (found or {}).items():
        if sizes[name] is not None and sizes[name] != value:
            raise ValueError(
                f"{name}={sizes[name]} was asked for, but {source} has {name}={value}: drop the flag, it is read there"
            )
        sizes[name] = value
    missing = [name for name in _REQUIRED if sizes[name] is None]
    if missing:
        raise ValueError(f"the model's {', '.join(missing)} are not known: give --hf-model, --load or the sizes")
    return dataclasses.replace(requested, **_with_defaults(sizes))


def architecture(model: ModelConfig) -> dict:
    """The sizes of a resolved model, as a checkpoint records them."""
    return {name: getattr(model, name) for name in ARCHITECTURE_FIELDS}


def _with_defaults(sizes: dict) -> dict:
    defaults = {
        "num_query_groups": sizes["num_attention_heads"],
        "kv_channels": sizes["hidden_size"] // sizes["num_attention_heads"],
        "max_position_embeddings": 2048,
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": False,
    }
    return {name: defaults.get(name) if value is None else value for name, value in sizes.items()}
