"""What a family of Hugging Face models is to the converter: sizes from its config, and one table of its weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_brain.config.model import ModelConfig
from megatron_brain.models.provider import Head

LAYERS = "decoder.layers."


def dimensions(model: ModelConfig) -> dict[str, int]:
    """Sizes by the names that the tables use. `query` and `key_value` are all heads of that kind."""
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "query": model.num_attention_heads * model.kv_channels,
        "key_value": model.num_query_groups * model.kv_channels,
        "label": 1,
    }


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How several Hugging Face tensors are one of megatron-core's; `split` is the inverse of `join`."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]


def _join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Rows of each query group together: its query heads, its key head, its value head."""
    groups = model.num_query_groups
    grouped = [part.reshape(groups, part.size(0) // groups, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(fused: Tensor, model: ModelConfig) -> list[Tensor]:
    groups, head = model.num_query_groups, model.kv_channels
    query = model.num_attention_heads // groups * head
    grouped = fused.reshape(groups, query + 2 * head, *fused.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([query, head, head], dim=1)]


SAME = Fusion(join=lambda parts, model: parts[0], split=lambda whole, model: [whole])
QKV = Fusion(join=_join_qkv, split=_split_qkv)
GATE_UP = Fusion(
    join=lambda parts, model: torch.cat(list(parts)),
    split=lambda fused, model: fused.chunk(2),
)


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name, with `{layer}` where there is one a layer, and its shape in `dimensions`."""

    name: str
    shape: tuple[str, ...]

    def in_layer(self, layer: int | None) -> str:
        return self.name.format(layer=layer)

    def sizes(self, model: ModelConfig) -> tuple[int, ...]:
        """The shape in numbers."""
        sizes = dimensions(model)
        return tuple(sizes[name] for name in self.shape)


@dataclass(frozen=True)
class Weight:
    """One row of a family's table.

    Attributes:
        name: megatron-core's name in a checkpoint, where the layer is an axis of the tensor and not part of the name
            and where the local and the Transformer Engine spec agree.
        sources: the Hugging Face tensors it is made of.
        fusion: how.
    """

    name: str
    sources: tuple[Source, ...]
    fusion: Fusion = SAME

    @property
    def per_layer(self) -> bool:
        return self.name.startswith(LAYERS)

    def layers(self, model: ModelConfig) -> Sequence[int | None]:
        """The layers that have this weight; `[None]` for one outside the layers."""
        return range(model.num_layers) if self.per_layer else [None]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of Hugging Face models.

    Attributes:
        name: for messages.
        policy_class, reward_class: names in `architectures` of config.json.
        architecture: sizes (keys of ARCHITECTURE_FIELDS) from config.json; raises ConfigError for what cannot be
            expressed.
        hf_config: the way back, what config.json says of the architecture.
        trunk: weights of the embedding, the layers and the final norm.
        output: the vocabulary projection, where it is not tied to the embedding.
        reward_head: the scalar head.
        ignored: ends of names of tensors that hold nothing learned.
    """

    name: str
    policy_class: str
    reward_class: str
    architecture: Callable[[dict], dict]
    hf_config: Callable[[ModelConfig], dict]
    trunk: tuple[Weight, ...]
    output: Weight
    reward_head: Weight
    ignored: tuple[str, ...] = ()

    def weights(self, model: ModelConfig, head: Head) -> list[Weight]:
        """Rows of the table that a model with this head has."""
        if head == "reward":
            return [*self.trunk, self.reward_head]
        return [*self.trunk, self.output] if model.untie_embeddings_and_output_weights else list(self.trunk)

    def tensors(self, model: ModelConfig, head: Head) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the Hugging Face model."""
        for weight in self.weights(model, head):
            for layer in weight.layers(model):
                for source in weight.sources:
                    yield source.in_layer(layer), source.sizes(model)
