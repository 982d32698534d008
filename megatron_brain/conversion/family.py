"""What a family of Hugging Face models is to the converter: what its config.json says, and one table of its weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.fusion import SAME, Fusion
from megatron_brain.errors import ConfigError


def dimensions(model: ModelConfig) -> dict[str, int]:
    """Sizes by the names that the tables use. `query` and `key_value` are all heads of that kind, `head` is one."""
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
    """A Hugging Face tensor: its name, with `{layer}` where there is one a layer, and its shape in `dimensions`."""

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
    """One row of a family's table.

    Attributes:
        name: the name in a checkpoint (`checkpointing.state`), with `{layer}` where there is one a layer.
        sources: the Hugging Face tensors it is made of.
        fusion: how.
    """

    name: str
    sources: tuple[Source, ...]
    fusion: Fusion = SAME

    def key(self, layer: int | None) -> str:
        """The name in a checkpoint of this weight in a layer, counted from 0."""
        return self.name.format(layer=layer)

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape in a checkpoint, which holds no padding of the vocabulary."""
        parts = [torch.empty(source.sizes(model), device="meta") for source in self.sources]
        return tuple(self.fusion.join(parts, model).shape)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of Hugging Face models.

    Attributes:
        name: for messages.
        model_type: of config.json.
        policy_class, reward_class: names in `architectures` of config.json.
        defaults: what transformers takes for what config.json leaves out. Of other keys `architecture` refuses those
            that change any family; the rest say nothing of the network.
        fixed: values of architecture fields that are the same in all models of the family.
        from_hf: the other architecture fields, from a config.json with its defaults filled in; raises ConfigError for
            what they cannot say.
        to_hf: the way back, what config.json says.
        limits: what of a model, apart from `fixed`, its config.json has no place for, and whether it is so.
        embedding, layer, final: rows of the table: before the layers, of every layer, after the layers.
        output: the vocabulary projection, where it is not tied to the embedding.
        reward_head: the scalar head.
        hf_layers, hf_final_norm: modules of the transformers model, by path.
        prefix: how names of the base model begin; files of the base model alone lack it.
        ignored: ends of names of tensors that hold nothing learned.
    """

    name: str
    model_type: str
    policy_class: str
    reward_class: str
    defaults: Mapping[str, object]
    fixed: Mapping[str, object]
    from_hf: Callable[[dict], dict]
    to_hf: Callable[[ModelConfig], dict]
    limits: Callable[[ModelConfig], dict[str, bool]] = field(default=lambda model: {})
    embedding: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    final: tuple[Weight, ...]
    output: Weight
    reward_head: Weight
    hf_layers: str
    hf_final_norm: str
    prefix: str
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def architecture(self, config: dict) -> dict:
        """Sizes of the model, keys of ARCHITECTURE_FIELDS, from config.json.

        Raises:
            ConfigError: the model has what ours cannot express, or a value is of another type than transformers takes.
        """
        refuse(
            self.name,
            {
                "quantization_config (quantised weights)": bool(config.get("quantization_config")),
                "is_causal=false (attention to later tokens)": not config.get("is_causal", True),
                "transformers_weights (weights in a file of another name)": bool(config.get("transformers_weights")),
                "per_layer_config (layers that are not alike)": bool(config.get("per_layer_config")),
            },
        )
        read = {key: config.get(key, default) for key, default in self.defaults.items()}
        for key, value in read.items():
            if not _is_like(value, self.defaults[key]):
                expected = type(self.defaults[key]).__name__
                raise ConfigError(f"config.json has {key}={value!r}, which must be of type {expected}")
        return {**self.fixed, **self.from_hf(read), "hf_model_type": self.model_type}

    def hf_config(self, model: ModelConfig) -> dict:
        """What config.json says of the architecture.

        Raises:
            ConfigError: a model of this family cannot have this architecture.
        """
        lacking = self.lacks(model)
        if lacking:
            raise ConfigError(f"transformers' {self.name} cannot have {'; '.join(lacking)}")
        return {"model_type": self.model_type, **self.to_hf(model)}

    def lacks(self, model: ModelConfig) -> list[str]:
        """What of a model its config.json has no place for."""
        other = [name for name, value in self.fixed.items() if getattr(model, name) != value]
        return [f"{name}={getattr(model, name)}" for name in other] + [
            what for what, is_so in self.limits(model).items() if is_so
        ]

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
        missing: what the network would have to have.
    """

    name: str
    classes: tuple[str, ...]
    missing: tuple[str, ...]


def _is_like(value: object, default: object) -> bool:
    """Whether a value is of its default's type; an integer is also a number. null, either of them, says no type."""
    if value is None or default is None:
        return True
    return type(value) is type(default) or (type(value) is int and type(default) is float)


def refuse(family: str, found: Mapping[str, bool]) -> None:
    """Raise ConfigError naming what of `found` is so: things of a config.json that have no place in our network."""
    unsupported = [what for what, is_so in found.items() if is_so]
    if unsupported:
        raise ConfigError(
            f"config.json has {'; '.join(unsupported)}: not supported for {family} models, and never ignored"
        )
