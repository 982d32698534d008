"""Parameters and floating-point operations of a model, counted from its sizes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.stage_spec import Head
from megatron_brain.models.architecture import padded_vocab_size
from megatron_brain.planning.workload import Layout, SegmentLength


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear map of a layer, `[inputs] -> [outputs]` over all tensor-parallel ranks.

    `column` splits the outputs over tensor-parallel ranks, `row` the inputs.
    """

    name: str
    inputs: int
    outputs: int
    split: Literal["column", "row"]
    bias: bool

    @property
    def weights(self) -> int:
        """Entries of the matrix."""
        return self.inputs * self.outputs

    def parameters(self, tensor: int) -> int:
        """Parameters on one tensor-parallel rank. The bias of a map that is split by rows is whole on each rank."""
        bias = self.outputs if self.bias else 0
        return self.weights // tensor + (bias // tensor if self.split == "column" else bias)


def linear_layers(model: ResolvedModel) -> tuple[Linear, ...]:
    """The linear maps of one layer: qkv, projection, fc1 (with the gate), fc2."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, key_value = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    bias = bool(model.add_bias_linear)
    fc1 = ffn * (2 if model.gated_linear_unit else 1)
    qkv_bias = bias or bool(model.add_qkv_bias)
    return (
        Linear(name="linear_qkv", inputs=hidden, outputs=query + 2 * key_value, split="column", bias=qkv_bias),
        Linear(name="linear_proj", inputs=query, outputs=hidden, split="row", bias=bias),
        Linear(name="linear_fc1", inputs=hidden, outputs=fc1, split="column", bias=bias),
        Linear(name="linear_fc2", inputs=ffn, outputs=hidden, split="row", bias=bias),
    )


def linear_weights(model: ResolvedModel) -> int:
    """Entries of all matrices of one layer, which FP8 applies to."""
    return sum(linear.weights for linear in linear_layers(model))


def norm_parameters(model: ResolvedModel) -> int:
    """Parameters of one norm over the hidden size."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def layer_parameters(model: ResolvedModel, tensor: int = 1) -> int:
    """Parameters of one layer on one tensor-parallel rank."""
    heads = 2 * model.kv_channels if model.qk_layernorm else 0
    return sum(linear.parameters(tensor) for linear in linear_layers(model)) + 2 * norm_parameters(model) + heads


def embedding_parameters(model: ResolvedModel, tensor: int = 1) -> int:
    """Parameters of token embedding and learned positions on one tensor-parallel rank of the first pipeline stage."""
    learned = model.position_embedding_type == "learned_absolute"
    positions = model.max_position_embeddings * model.hidden_size if learned else 0
    return padded_vocab_size(model, tensor) // tensor * model.hidden_size + positions


def output_parameters(model: ResolvedModel, head: Head, tensor: int = 1, pipeline: int = 1) -> int:
    """Parameters of final norm and head on one tensor-parallel rank of the last pipeline stage.

    Weights tied to the embedding's exist a second time where there is more than one pipeline stage.
    """
    if head == "reward":
        return norm_parameters(model) + model.hidden_size
    shared = pipeline == 1 and not model.untie_embeddings_and_output_weights
    rows = 0 if shared else padded_vocab_size(model, tensor) // tensor
    return norm_parameters(model) + rows * model.hidden_size


def pipeline_stage_layers(model: ResolvedModel, layout: Layout, pipeline_stage: int) -> int:
    """Number of layers of one pipeline stage."""
    ends = 2 if layout.account_for_ends else 0
    each = (model.num_layers + ends) // layout.pipeline
    if not layout.account_for_ends:
        return each
    return each - (pipeline_stage == 0) - (pipeline_stage == layout.pipeline - 1)


def pipeline_stage_parameters(model: ResolvedModel, layout: Layout, pipeline_stage: int, head: Head = "policy") -> int:
    """Parameters of one pipeline stage on one of its tensor-parallel ranks."""
    total = pipeline_stage_layers(model, layout, pipeline_stage) * layer_parameters(model, layout.tensor)
    if pipeline_stage == 0:
        total += embedding_parameters(model, layout.tensor)
    if pipeline_stage == layout.pipeline - 1:
        total += output_parameters(model, head, layout.tensor, layout.pipeline)
    return total


def total_parameters(model: ResolvedModel, head: Head = "policy") -> int:
    """Parameters of the whole model, without the padding of the vocabulary."""
    padding = padded_vocab_size(model, 1) - model.vocab_size
    matrices = 1 + (head == "policy" and bool(model.untie_embeddings_and_output_weights))
    return pipeline_stage_parameters(model, Layout(), 0, head) - padding * model.hidden_size * matrices


def linear_flops(model: ResolvedModel, tokens: float) -> float:
    """Operations of one forward pass of `tokens` through the linear maps of one layer: 2 for each weight and token."""
    return 2 * tokens * linear_weights(model)


def attended_pairs(segments: Iterable[SegmentLength]) -> int:
    """Pairs of query and key: each token with itself, with those before it in its segment, and with its prefix."""
    return sum(s.length * (s.length + 1) // 2 + s.length * s.prefix for s in segments)


def attention_flops(model: ResolvedModel, segments: Iterable[SegmentLength]) -> int:
    """Operations of one forward pass through the core attention of one layer: scores and weighted values take 2 each
    for every pair and channel of every query head."""
    return 4 * attended_pairs(segments) * model.num_attention_heads * model.kv_channels


def head_flops(model: ResolvedModel, targets: int) -> int:
    """Operations of one matrix product of hidden states at `targets` positions with the output layer."""
    return 2 * targets * model.hidden_size * padded_vocab_size(model, 1)


def model_flops(model: ResolvedModel, segments: Iterable[SegmentLength], targets: int) -> float:
    """Operations of one forward and backward pass, three times the forward pass, without recomputation."""
    segments = tuple(segments)
    tokens = sum(segment.length for segment in segments)
    layer = linear_flops(model, tokens) + attention_flops(model, segments)
    return 3 * (model.num_layers * layer + head_flops(model, targets))
