"""Finds the sizes of the model before anything is built: from a checkpoint, a Hugging Face folder or explicit flags."""

from typing import Any

from megatron_brain.config.fields import all_fields, convert
from megatron_brain.config.model import ModelConfig, ResolvedModel
from megatron_brain.errors import ConfigError

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
    "rotary_percent",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
    "window_size",
    "normalization",
    "norm_epsilon",
    "qk_layernorm",
    "hidden_act",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "use_parallel_residual",
    "untie_embeddings_and_output_weights",
    "hf_model_type",
)
"""The fields of ModelConfig that a checkpoint fixes. Each run chooses the other ones."""

REQUIRED_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
"""The sizes that must be given; the other ones have a default."""

_DEFAULTS = {
    "max_position_embeddings": 2048,
    "position_embedding_type": "rope",
    "rotary_base": 10000.0,
    "rotary_percent": 1.0,
    "rope_scaling_factor": 1.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 8192,
    "window_size": None,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "qk_layernorm": False,
    "hidden_act": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "use_parallel_residual": False,
    "untie_embeddings_and_output_weights": False,
    "hf_model_type": None,
}
"""The values of fields that nothing sets. Those of `num_query_groups` and `kv_channels` follow from the sizes."""


def resolve(requested: ModelConfig, found: dict[str, Any] | None, source: str) -> ResolvedModel:
    """`requested` with its unset sizes taken from `found` (a checkpoint or a Hugging Face model), or else by default.

    A field that `found` leaves out has its default there: a Hugging Face family need not name what it cannot have.

    Raises:
        ConfigError: `source` has an unknown field, a value of a wrong type, or one that contradicts `requested`; or a
            size is missing, or the sizes do not fit together.
    """
    unknown = sorted((found or {}).keys() - set(ARCHITECTURE_FIELDS))
    if unknown:
        raise ConfigError(f"{source} has {', '.join(unknown)}, which this version of megatron_brain does not know")
    sizes = {name: getattr(requested, name) for name in ARCHITECTURE_FIELDS}
    for name, given in ({**_DEFAULTS, **found} if found else {}).items():
        spec = all_fields()[name]
        if isinstance(given, str) and spec.kind is not str:
            # `convert` reads text as a command line does, where "2" is a number; in JSON "2" is text.
            raise ConfigError(f"{name}={given!r} ({source}): expected {spec.expected}")
        value = convert(spec, given, source)
        if sizes[name] is not None and sizes[name] != value:
            raise ConfigError(
                f"{name}={sizes[name]} was asked for, but {source} has {name}={value}: drop the flag, it is read there"
            )
        sizes[name] = value
    missing = [name for name in REQUIRED_SIZES if sizes[name] is None]
    if missing:
        raise ConfigError(f"the model's {', '.join(missing)} are not known: give --hf-model, --load or the sizes")
    try:
        return ResolvedModel(**{**vars(requested), **_with_defaults(sizes)})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The sizes of a resolved model, in the form that a checkpoint records."""
    return {name: getattr(model, name) for name in ARCHITECTURE_FIELDS}


def _with_defaults(sizes: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        **_DEFAULTS,
        "num_query_groups": sizes["num_attention_heads"],
        "kv_channels": sizes["hidden_size"] // sizes["num_attention_heads"],
    }
    return {name: defaults.get(name) if value is None else value for name, value in sizes.items()}


def padded_vocab_size(model: ResolvedModel, tensor_parallel_size: int) -> int:
    """Vocabulary size rounded up so that every tensor-parallel rank holds the same number of rows."""
    multiple = model.make_vocab_size_divisible_by * tensor_parallel_size
    return -(-model.vocab_size // multiple) * multiple
