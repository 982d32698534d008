"""What the config.json of several families have in common: sizes, activations, rotary positions, windows."""

from collections.abc import Collection, Mapping

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.family import refuse
from megatron_brain.errors import ConfigError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""transformers' names of `hidden_act`; the gelu_tanh ones are one function in three implementations."""

ROPE_DEFAULTS = {
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
"""Keys that rotary positions are read from, and what transformers takes where they are left out."""


def read_sizes(config: dict, names: Mapping[str, str]) -> dict:
    """Values by our names, from those of config.json.

    Args:
        names: names in config.json by ours.

    Raises:
        ConfigError: one of them is null or not positive.
    """
    missing = [theirs for theirs in names.values() if config[theirs] is None]
    if missing:
        raise ConfigError(f"config.json has no {', '.join(missing)}: the model's sizes are not known; write it there")
    wrong = [f"{theirs}={config[theirs]}" for theirs in names.values() if config[theirs] <= 0]
    if wrong:
        raise ConfigError(f"config.json has {', '.join(wrong)}: must be positive")
    return {ours: config[theirs] for ours, theirs in names.items()}


def write_sizes(model: ModelConfig, names: Mapping[str, str]) -> dict:
    """The way back of `read_sizes`."""
    return {theirs: getattr(model, ours) for ours, theirs in names.items()}


def multi_head_limits(model: ModelConfig) -> dict[str, bool]:
    """What a family says nothing of that divides its hidden size among as many key/value heads as query heads."""
    heads, head = model.num_attention_heads, model.kv_channels
    return {
        f"num_query_groups={model.num_query_groups} for {heads} heads": model.num_query_groups != heads,
        f"kv_channels={head}, which is not hidden_size / num_attention_heads": head * heads != model.hidden_size,
    }


def read_rope(
    family: str, config: dict, *, types: Collection[str] = ("default", "llama3"), partial: bool = False
) -> dict:
    """Rotary positions, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Args:
        config: with the keys of ROPE_DEFAULTS and `max_position_embeddings`.
        types: values of `rope_type` that transformers' model has and we have too.
        partial: whether transformers' model may rotate only the first channels of a head.

    Raises:
        ConfigError: positions are of another kind.
    """
    rope = config["rope_scaling"] or config["rope_parameters"] or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"config.json has {rope!r} as rope_scaling or rope_parameters, which must be an object")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    percents = (rope.get("partial_rotary_factor"), config["partial_rotary_factor"], 1.0)
    percent = next(value for value in percents if value is not None)
    by_layer = any(isinstance(value, dict) for value in rope.values())
    refuse(
        family,
        {
            f"rope_type={rope_type!r} (scaled rotary positions)": rope_type not in types,
            "rope_parameters by layer type": by_layer,
            f"partial_rotary_factor={percent} (only some channels rotated)": percent != 1.0 and not partial,
        },
    )
    theta = rope.get("rope_theta", config["rope_theta"])
    if theta is None:
        raise ConfigError("config.json has rope_theta=null: the base of the rotary positions is not known")
    base = {"rotary_base": _number("rope_theta", theta), "rotary_percent": _number("partial_rotary_factor", percent)}
    if rope_type == "default":
        return base
    original = rope.get("original_max_position_embeddings")
    factors = {
        "rope_scaling_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
    }
    missing = [theirs for theirs in factors.values() if rope.get(theirs) is None]
    if missing:
        raise ConfigError(f"config.json has rope_type={rope_type!r} without {', '.join(missing)}, which it needs")
    return {
        **base,
        **{ours: _number(theirs, rope[theirs]) for ours, theirs in factors.items()},
        "rope_original_max_position_embeddings": original or config["max_position_embeddings"],
    }


def _number(name: str, value: object) -> float:
    if type(value) not in (int, float):
        raise ConfigError(f"config.json has {name}={value!r}, which must be a number")
    return float(value)


def write_rope(model: ModelConfig) -> dict:
    """Rotary positions as transformers 5 (`rope_parameters`) and as transformers 4 and other engines read them."""
    scaling = {"rope_type": "default"}
    if model.rope_scaling_factor != 1.0:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_position_embeddings,
        }
    partial = {} if model.rotary_percent == 1.0 else {"partial_rotary_factor": model.rotary_percent}
    return {
        "rope_theta": model.rotary_base,
        **partial,
        "rope_scaling": None if model.rope_scaling_factor == 1.0 else scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, **partial, **scaling},
    }


def read_activation(family: str, name: str, *, allowed: Collection[str]) -> str:
    """Our name of an activation.

    Raises:
        ConfigError: it is not one of the `allowed`, by our names.
    """
    known = ACTIVATIONS.get(name)
    others = " or ".join(sorted(allowed))
    refuse(family, {f"hidden_act={name!r} (an activation other than {others})": known not in allowed})
    return known


WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
"""Keys that a window by layer is read from, with the defaults of Qwen 2 and Qwen 3."""


def read_window_by_layer(family: str, config: dict) -> dict:
    """The attention window of a family whose config.json says which layers have it.

    Raises:
        ConfigError: some layers have it and others do not, and the model takes sequences for which that matters.
    """
    window, layers = config["sliding_window"], config["num_hidden_layers"]
    if not config["use_sliding_window"] or window is None:
        return {"window_size": None}
    types, first = config["layer_types"], config["max_window_layers"]
    if not isinstance(types, list | None) or (types is None and first is None):
        raise ConfigError(f"config.json has layer_types={types!r} and max_window_layers={first}: which layers have it?")
    windowed = max(0, layers - first) if types is None else types.count("sliding_attention")
    if windowed == layers:
        return {"window_size": window}
    refuse(
        family,
        {
            f"sliding_window={window} in {windowed} of {layers} layers (attention over a window in some)": windowed > 0
            and config["max_position_embeddings"] > window
        },
    )
    return {"window_size": None}


def write_window_by_layer(model: ModelConfig) -> dict:
    """The way back of `read_window_by_layer`."""
    windowed = model.window_size is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": model.window_size,
        "max_window_layers": 0 if windowed else model.num_layers,
    }
