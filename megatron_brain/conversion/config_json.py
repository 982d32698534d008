"""Rules that families share: how config.json says sizes, heads, activations, rotary positions and windows."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.family import Rule
from megatron_brain.errors import ConfigError


def fixed(value: object) -> Rule:
    """All models of the family have this value, and config.json does not say it."""
    return Rule(read=lambda config: value, allows=lambda asked, model: asked == value)


def same(key: str) -> Rule:
    """config.json has the value, as it is, under this key."""
    return Rule(read=lambda config: config[key], write=lambda value, model: {key: value})


def size(key: str) -> Rule:
    """config.json has the value, as it is, under this key, and it must be a positive number."""
    return dataclasses.replace(same(key), size=key)


UNUSED = Rule(read=lambda config: None)
"""The family's networks do not use the field: they are the same whatever its value."""

OUTPUT_TIE = Rule(
    read=lambda config: not config["tie_word_embeddings"],
    write=lambda value, model: {"tie_word_embeddings": not value},
)
"""The rule of `untie_embeddings_and_output_weights`."""

GROUPED_QUERY_HEADS = Rule(
    read=lambda config: config["num_key_value_heads"] or config["num_attention_heads"],
    write=lambda value, model: {"num_key_value_heads": value},
)
"""The rule of `num_query_groups` where config.json may leave out the number of key/value heads."""

HEAD_SIZE = Rule(
    read=lambda config: config["head_dim"] or config["hidden_size"] // config["num_attention_heads"],
    write=lambda value, model: {"head_dim": value},
)
"""The rule of `kv_channels` where config.json may leave out the size of a head."""

UNLISTED_HEAD_SIZE = dataclasses.replace(
    HEAD_SIZE,
    write=lambda value, model: {} if value * model.num_attention_heads == model.hidden_size else {"head_dim": value},
)
"""The same where transformers' configuration class does not list `head_dim`, but its model reads it if it is there."""


def multi_head(*, hidden: str, heads: str) -> dict[str, Rule]:
    """Rules of a family that divides its hidden size among as many key/value heads as query heads.

    Args:
        hidden: key of the hidden size.
        heads: key of the number of heads.
    """
    return {
        "num_query_groups": Rule(
            read=lambda config: config[heads],
            allows=lambda value, model: value == model.num_attention_heads,
            because=" for {num_attention_heads} heads",
        ),
        "kv_channels": Rule(
            read=lambda config: config[hidden] // config[heads],
            allows=lambda value, model: value * model.num_attention_heads == model.hidden_size,
            because=", which is not hidden_size / num_attention_heads",
        ),
    }


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Our names of activations by transformers'. The gelu_tanh ones are one function in three implementations."""


def activation(names: Mapping[str, str], *, key: str = "hidden_act") -> Rule:
    """The rule of `hidden_act` for a family that has these activations.

    Args:
        names: the names that are written, by our names.
    """
    known = " or ".join(sorted(names))
    return Rule(
        read=lambda config: _ACTIVATIONS[config[key]],
        write=lambda value, model: {key: names[value]},
        allows=lambda value, model: value in names,
        refused=lambda config: {
            f"hidden_act={config[key]!r} (an activation other than {known})": _ACTIVATIONS.get(config[key]) not in names
        },
    )


ROPE_DEFAULTS = {
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
"""The keys that `rope` reads, with transformers' defaults."""

_FACTORS = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
}
_SCALING = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position_embeddings")
ROPE_FIELDS = ("rotary_base", "rotary_percent", "rope_scaling_factor", *_SCALING)
"""The architecture fields of rotary positions."""


def write_rope(model: ModelConfig) -> dict:
    """Rotary positions, as transformers 5 reads them (`rope_parameters`) and as transformers 4 and other engines do."""
    scaling = {"rope_type": "default"}
    if model.rope_scaling_factor != 1.0:
        scaling = {
            "rope_type": "llama3",
            **{theirs: getattr(model, ours) for ours, theirs in _FACTORS.items()},
            "original_max_position_embeddings": model.rope_original_max_position_embeddings,
        }
    partial = {} if model.rotary_percent == 1.0 else {"partial_rotary_factor": model.rotary_percent}
    return {
        "rope_theta": model.rotary_base,
        **partial,
        "rope_scaling": None if model.rope_scaling_factor == 1.0 else scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, **partial, **scaling},
    }


def rope(
    *,
    types: Collection[str] = ("default", "llama3"),
    partial: bool = False,
    theta: str = "rope_theta",
    percent: str = "partial_rotary_factor",
    write: Callable[[ModelConfig], dict] = write_rope,
) -> dict[str, Rule]:
    """Rules of the fields of rotary positions. They read the spelling of transformers 4 and that of transformers 5.

    Args:
        types: values of `rope_type` that both transformers' model and ours have.
        partial: whether transformers' model can rotate only the first channels of a head.
        theta: key of the base.
        percent: key of the share of the channels that is rotated.
        write: returns the keys of config.json that say these fields.
    """
    scaled = "llama3" in types
    at_one = {"rotary_percent": not partial, "rope_scaling_factor": not scaled}

    def refused(config: dict) -> dict[str, bool]:
        settings, share = _rope_settings(config), _rotated_share(config, percent)
        rope_type = _rope_type(settings)
        return {
            f"rope_type={rope_type!r} (scaled rotary positions)": rope_type not in types,
            "rope_parameters by layer type": any(isinstance(value, dict) for value in settings.values()),
            f"partial_rotary_factor={share} (only some channels rotated)": share != 1.0 and not partial,
        }

    def rule(name: str) -> Rule:
        return Rule(
            read=lambda config: _read_rope(config, theta, percent).get(name),
            write=lambda value, model: write(model),
            allows=lambda value, model: value == 1.0 or not at_one.get(name, False),
            refused=refused,
        )

    # Without scaling the network does not use the fields that say how to scale.
    return {name: rule(name) if scaled or name not in _SCALING else UNUSED for name in ROPE_FIELDS}


def _rope_settings(config: dict) -> dict:
    settings = config["rope_scaling"] or config["rope_parameters"] or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"config.json has {settings!r} as rope_scaling or rope_parameters, which must be an object")
    return settings


def _rope_type(settings: dict) -> str:
    return settings.get("rope_type") or settings.get("type") or "default"


def _rotated_share(config: dict, percent: str) -> object:
    shares = (_rope_settings(config).get("partial_rotary_factor"), config[percent], 1.0)
    return next(share for share in shares if share is not None)


def _read_rope(config: dict, theta: str, percent: str) -> dict:
    """Values of the fields of rotary positions; the fields of scaling are left out where there is none."""
    settings = _rope_settings(config)
    base = settings.get("rope_theta", config[theta])
    if base is None:
        raise ConfigError("config.json has rope_theta=null: the base of the rotary positions is not known")
    unscaled = {
        "rotary_base": _number("rope_theta", base),
        "rotary_percent": _number("partial_rotary_factor", _rotated_share(config, percent)),
    }
    rope_type = _rope_type(settings)
    if rope_type == "default":
        return unscaled
    missing = [theirs for theirs in _FACTORS.values() if settings.get(theirs) is None]
    if missing:
        raise ConfigError(f"config.json has rope_type={rope_type!r} without {', '.join(missing)}, which it needs")
    original = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return {
        **unscaled,
        **{ours: _number(theirs, settings[theirs]) for ours, theirs in _FACTORS.items()},
        "rope_original_max_position_embeddings": original,
    }


def _number(name: str, value: object) -> float:
    if type(value) not in (int, float):
        raise ConfigError(f"config.json has {name}={value!r}, which must be a number")
    return float(value)


WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
"""The keys that WINDOW_BY_LAYER reads, with the defaults of Qwen 2 and Qwen 3."""


def _windowed_layers(config: dict) -> int:
    """How many layers attend over a window."""
    if not config["use_sliding_window"] or config["sliding_window"] is None:
        return 0
    types, first = config["layer_types"], config["max_window_layers"]
    if not isinstance(types, list | None) or (types is None and first is None):
        raise ConfigError(f"config.json has layer_types={types!r} and max_window_layers={first}: which layers have it?")
    return max(0, config["num_hidden_layers"] - first) if types is None else types.count("sliding_attention")


def _window_of_some(config: dict) -> dict[str, bool]:
    """A window in some layers only matters where the model takes sequences that are longer than it."""
    window, layers, windowed = config["sliding_window"], config["num_hidden_layers"], _windowed_layers(config)
    matters = 0 < windowed < layers and config["max_position_embeddings"] > window
    return {f"sliding_window={window} in {windowed} of {layers} layers (attention over a window in some)": matters}


def _write_window(window: int | None, model: ModelConfig) -> dict:
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": model.num_layers if window is None else 0,
    }


WINDOW_BY_LAYER = Rule(
    read=lambda config: config["sliding_window"] if _windowed_layers(config) == config["num_hidden_layers"] else None,
    write=_write_window,
    refused=_window_of_some,
)
"""The rule of `window_size` where config.json says which layers have the window."""
