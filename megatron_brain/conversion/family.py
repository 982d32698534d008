"""What the converter knows about a family of Hugging Face models: rules for its config.json, a table of its weights."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.fusion import SAME, Fusion
from megatron_brain.errors import ConfigError

ATTENTION = "decoder.layers.{layer}.self_attention."
MLP = "decoder.layers.{layer}.mlp."
"""How the names of a layer's weights begin in a checkpoint."""


def dimensions(model: ModelConfig) -> dict[str, int]:
    """Sizes, by the names in the tables. `query` and `key_value` are all heads of that kind, `head` is one head."""
    query = model.num_attention_heads * model.kv_channels
    key_value = model.num_query_groups * model.kv_channels
    return {
        "vocab": model.vocab_size,
        "positions": model.max_position_embeddings,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "gate_and_up": 2 * model.ffn_hidden_size,
        "query": query,
        "key_value": key_value,
        "qkv": query + 2 * key_value,
        "head": model.kv_channels,
        "label": 1,
    }


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name, with `{layer}` if every layer has one, and its shape by `dimensions`."""

    name: str
    shape: tuple[str, ...]

    def in_layer(self, layer: int | None) -> str:
        """The tensor's name in a layer, counted from 0."""
        return self.name.format(layer=layer)

    def sizes(self, model: ModelConfig) -> tuple[int, ...]:
        """The shape in numbers."""
        sizes = dimensions(model)
        return tuple(sizes[name] for name in self.shape)


@dataclass(frozen=True)
class Weight:
    """One row of a family's table: how a weight of a checkpoint is made.

    Attributes:
        name: the name in a checkpoint (`checkpointing.state`), with `{layer}` if every layer has one.
        sources: the Hugging Face tensors that the weight is made of.
        fusion: how the weight is made of them.
    """

    name: str
    sources: tuple[Source, ...]
    fusion: Fusion = SAME

    def key(self, layer: int | None) -> str:
        """The weight's name in a checkpoint in a layer, counted from 0."""
        return self.name.format(layer=layer)

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape in a checkpoint. A checkpoint holds no padding of the vocabulary."""
        parts = [torch.empty(source.sizes(model), device="meta") for source in self.sources]
        return tuple(self.fusion.join(parts, model).shape)


def _nothing(*_: object) -> dict:
    return {}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a family does with one architecture field, in both directions.

    Attributes:
        read: returns the value, given a config.json with its defaults filled in. None means our default.
        write: returns the keys of config.json that say the value, given the value and the model.
        allows: whether a model of this family can have the value. Any other value refuses the export.
        because: follows `field=value` in the message of a value that is not allowed. Braces name fields of the model.
        refused: returns what our network cannot compute, in words, and whether this config.json asks for it.
        size: the key of config.json that must hold a positive number, or None.
    """

    read: Callable[[dict], Any]
    write: Callable[[Any, ModelConfig], dict] = _nothing
    allows: Callable[[Any, ModelConfig], bool] = lambda value, model: True
    because: str = ""
    refused: Callable[[dict], dict[str, bool]] = _nothing
    size: str | None = None


REWARD_HEAD = Weight("reward_head.weight", (Source("score.weight", ("label", "hidden")),))
"""The scalar head, which has the same name in all families."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of Hugging Face models.

    Attributes:
        name: for messages.
        model_type: of config.json.
        policy_class, reward_class: names in `architectures` of config.json.
        defaults: the keys of config.json that are read, with what transformers takes where they are left out.
            `architecture` refuses other keys that change any family; the rest say nothing about the network.
        aliases: other names that transformers accepts for some of these keys, and the keys. The other name wins.
        must_be_default: keys whose default is the only value that our network computes, and what another value means.
        rules: one for every field of ARCHITECTURE_FIELDS, except `hf_model_type`.
        constants: further keys that every written config.json has, with their values.
        embedding, layer, final: rows of the table: before the layers, in every layer, after the layers.
        output: the vocabulary projection, where it is not tied to the embedding.
        reward_head: the scalar head.
        hf_layers, hf_final_norm: paths of modules of the transformers model.
        prefix: how names of the base model begin. Files that hold the base model alone lack it.
        ignored: ends of the names of tensors that hold nothing learned.
    """

    name: str
    model_type: str
    policy_class: str
    reward_class: str
    defaults: Mapping[str, object]
    aliases: Mapping[str, str] = field(default_factory=dict)
    must_be_default: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, Rule]
    constants: Mapping[str, object]
    embedding: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    final: tuple[Weight, ...]
    output: Weight
    reward_head: Weight = REWARD_HEAD
    hf_layers: str
    hf_final_norm: str
    prefix: str
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def architecture(self, config: dict) -> dict:
        """Architecture of the model that config.json describes, with keys of ARCHITECTURE_FIELDS.

        A field that is left out has our default.

        Raises:
            ConfigError: the model has what our network cannot express, a size is missing or not positive, or a value
                has another type than transformers takes.
        """
        read = self._with_defaults(config)
        self._check_sizes(read)
        refused = {
            "quantization_config (quantised weights)": bool(config.get("quantization_config")),
            "is_causal=false (attention to later tokens)": not config.get("is_causal", True),
            "transformers_weights (weights in a file of another name)": bool(config.get("transformers_weights")),
            "per_layer_config (layers that are not alike)": bool(config.get("per_layer_config")),
        }
        for key, what in self.must_be_default.items():
            refused[f"{key}={json.dumps(read[key])} ({what})"] = not _means(read[key], self.defaults[key])
        for rule in self.rules.values():
            refused |= rule.refused(read)
        unsupported = [what for what, is_asked in refused.items() if is_asked]
        if unsupported:
            raise ConfigError(
                f"config.json has {'; '.join(unsupported)}: not supported for {self.name} models, and never ignored"
            )
        values = {name: rule.read(read) for name, rule in self.rules.items()}
        given = {name: value for name, value in values.items() if value is not None}
        return {**given, "hf_model_type": self.model_type}

    def hf_config(self, model: ModelConfig) -> dict:
        """What config.json says about the architecture.

        Raises:
            ConfigError: a model of this family cannot have this architecture.
        """
        lacking = self.lacks(model)
        if lacking:
            raise ConfigError(f"transformers' {self.name} cannot have {'; '.join(lacking)}")
        written = {"model_type": self.model_type, **self.constants, "initializer_range": model.init_method_std}
        for name, rule in self.rules.items():
            written |= rule.write(getattr(model, name), model)
        return written

    def lacks(self, model: ModelConfig) -> list[str]:
        """What a model has that this family's config.json cannot say."""
        return [
            f"{name}={getattr(model, name)}{rule.because.format(**vars(model))}"
            for name, rule in self.rules.items()
            if not rule.allows(getattr(model, name), model)
        ]

    def _with_defaults(self, config: dict) -> dict:
        """The keys of `defaults`, with their values in config.json or their defaults."""
        read = {key: config.get(key, default) for key, default in self.defaults.items()}
        read |= {key: config[other] for other, key in self.aliases.items() if config.get(other) is not None}
        for key, value in read.items():
            if not _is_like(value, self.defaults[key]):
                expected = type(self.defaults[key]).__name__
                raise ConfigError(f"config.json has {key}={value!r}, which must be of type {expected}")
        return read

    def _check_sizes(self, read: dict) -> None:
        sizes = {rule.size: read[rule.size] for rule in self.rules.values() if rule.size is not None}
        missing = [key for key, value in sizes.items() if value is None]
        if missing:
            raise ConfigError(
                f"config.json has no {', '.join(missing)}: the model's sizes are not known; write it there"
            )
        wrong = [f"{key}={value}" for key, value in sizes.items() if value <= 0]
        if wrong:
            raise ConfigError(f"config.json has {', '.join(wrong)}: must be positive")

    def entries(self, model: ModelConfig, head: Head) -> Iterator[tuple[Weight, int | None]]:
        """Every weight of the model with its layer, in the order of the network: layer by layer."""
        for weight in self.embedding:
            yield weight, None
        for layer in range(model.num_layers):
            for weight in self.layer:
                yield weight, layer
        for weight in (*self.final, *self._head(model, head)):
            yield weight, None

    def tensors(self, model: ModelConfig, head: Head) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the Hugging Face model."""
        for weight, layer in self.entries(model, head):
            for source in weight.sources:
                yield source.in_layer(layer), source.sizes(model)

    def stored_key(self, weight: Weight, layer: int | None, model: ModelConfig) -> str:
        """The name in a checkpoint of `model` of the values of a weight: a tied output layer is the embedding's."""
        tied = weight == self.output and not model.untie_embeddings_and_output_weights
        return self.embedding[0].key(None) if tied else weight.key(layer)

    def _head(self, model: ModelConfig, head: Head) -> list[Weight]:
        if head == "reward":
            return [self.reward_head]
        return [self.output] if model.untie_embeddings_and_output_weights else []


@dataclass(frozen=True, kw_only=True)
class UnsupportedFamily:
    """A known family of Hugging Face models that our network cannot compute.

    Attributes:
        name: for messages.
        classes: names in `architectures` of config.json.
        missing: what our network lacks.
    """

    name: str
    classes: tuple[str, ...]
    missing: tuple[str, ...]


def _is_like(value: object, default: object) -> bool:
    """Whether a value has the type of its default. An integer is also a float, and null fits any type."""
    if value is None or default is None:
        return True
    return type(value) is type(default) or (type(value) is int and type(default) is float)


def _means(value: object, default: object) -> bool:
    """Whether a value means the same as its default. null means false."""
    return (bool(value) if isinstance(default, bool) else value) == default


def replaced(table: Sequence[Weight], *rows: Weight) -> tuple[Weight, ...]:
    """A table in which each of `rows` takes the place of the row of the same name, or stands at the end."""
    return tuple({weight.name: weight for weight in (*table, *rows)}.values())
