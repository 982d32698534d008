"""Tensors of one micro-batch on one rank: what each part of the model keeps for the backward pass, and the most that it
holds for a moment. All figures are bytes.

The backward pass frees part by part what was kept, so its peaks are near its start. The code computes each peak as a
point: what exists by then, less what is already freed. docs/planner.md has the same formulas in words.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_brain.config.model import ResolvedModel
from megatron_brain.config.stage_spec import Head
from megatron_brain.models.architecture import padded_vocab_size
from megatron_brain.models.logit_blocks import PRODUCT_SIZE, block_shape, positions_of_whole_rows
from megatron_brain.planning.workload import Layout, Workload

TransformerImpl = Literal["local", "transformer_engine"]

FLOAT32 = 4
_INT64 = 8


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of one micro-batch on one rank of the model."""

    model: ResolvedModel
    element: int
    """Bytes of an entry of an activation."""
    impl: TransformerImpl
    tokens: int
    """T, the tokens of the whole sequence, which attention and feed-forward layer see."""
    shard: int
    """Tokens of the residual stream on this rank: fewer than T with sequence parallelism."""
    targets: int
    """N, the positions whose next token's log-probability is computed."""
    key_tokens: int
    """Keys that the attention of Transformer Engine reads: those of a prompt once for each response. T without shared
    prefix."""
    tensor: int
    """Tensor-parallel size."""

    @classmethod
    def of(cls, workload: Workload, layout: Layout, model: ResolvedModel, impl: TransformerImpl) -> "Shapes":
        """The sizes of a training micro-batch of a workload."""
        tokens = workload.micro_batch_tokens(layout)
        # The share is less than 1 where a token budget cuts a sample.
        share = min(1.0, tokens / (workload.sample_tokens * layout.micro_batch_size))
        targets = math.ceil(workload.sample_targets * layout.micro_batch_size * share)
        keys = sum(segment.prefix + segment.length for segment in workload.segments)
        has_prefix = any(segment.prefix for segment in workload.segments)
        return cls(
            model=model,
            element=FLOAT32 if workload.precision == "fp32" else 2,
            impl=impl,
            tokens=tokens,
            shard=tokens // layout.sequence_shards,
            targets=targets,
            key_tokens=math.ceil(keys * layout.micro_batch_size * share) if has_prefix else tokens,
            tensor=layout.tensor,
        )

    @property
    def hidden(self) -> int:
        """The residual stream on this rank."""
        return self.shard * self.model.hidden_size * self.element

    @property
    def whole_hidden(self) -> int:
        """Hidden states of the whole sequence."""
        return self.tokens * self.model.hidden_size * self.element

    @property
    def gathered(self) -> int:
        """The residual stream that sequence parallelism gathers; 0 where it is already whole."""
        return self.whole_hidden if self.shard != self.tokens else 0

    @property
    def query(self) -> int:
        """Queries of this rank's attention heads; their output is as large."""
        return self.tokens * self.model.num_attention_heads * self.model.kv_channels // self.tensor * self.element

    @property
    def key(self) -> int:
        """Keys of this rank's attention heads; their values are as large."""
        heads = max(1, self.model.num_query_groups // self.tensor)
        return self.tokens * heads * self.model.kv_channels * self.element

    @property
    def ffn(self) -> int:
        """The feed-forward layer's activation."""
        return self.tokens * self.model.ffn_hidden_size // self.tensor * self.element

    @property
    def fc1(self) -> int:
        """The feed-forward layer's first product, gate included."""
        return self.ffn * (2 if self.model.gated_linear_unit else 1)

    @property
    def rows(self) -> int:
        """Number of rows of the output layer on this rank."""
        return padded_vocab_size(self.model, self.tensor) // self.tensor

    @property
    def head_weight(self) -> int:
        """Number of entries of the output layer on this rank; the token embedding has as many."""
        return self.rows * self.model.hidden_size

    @property
    def rotation(self) -> int:
        """Cosine and sine for every position."""
        if self.model.position_embedding_type != "rope":
            return 0
        dim = self.model.kv_channels
        return self.tokens * (dim + int(dim * self.model.rotary_percent)) * self.element

    @property
    def batch(self) -> int:
        """A packed batch: tokens and their positions; for each target its place, id, mask and response."""
        return self.tokens * 2 * _INT64 + self.targets * (3 * _INT64 + 1)

    def added(self, size: int) -> int:
        """What it takes to add a weight gradient of `size` bytes to a float32 buffer: the gradient, and on a CPU, where
        PyTorch casts operands whole, its float32 copy."""
        copied = self.impl == "local" and self.element != FLOAT32
        return size + (size // self.element * FLOAT32 if copied else 0)

    def linear_input(self, size: int, *, fp8: bool) -> int:
        """What a linear map keeps of its input of `size` bytes."""
        return size // self.element if fp8 else size


def norm_kept(shapes: Shapes, *, with_input: bool = True) -> int:
    """What a norm over the residual stream keeps besides its output.

    Fused kernels and LayerNorm keep their input and one or two numbers for each token. RMSNorm on a CPU consists of
    single operations: it keeps its input in float32 (a copy unless it already is float32) and the normalised input
    before the weight.
    """
    numbers = shapes.shard * FLOAT32
    if shapes.impl == "local" and shapes.model.normalization == "RMSNorm":
        normalised = shapes.shard * shapes.model.hidden_size * FLOAT32
        copied = shapes.element != FLOAT32
        return normalised + numbers + (normalised if copied or with_input else 0)
    return (shapes.hidden if with_input else 0) + 2 * numbers


def norm_keeps_input(shapes: Shapes) -> bool:
    """Whether a norm keeps the residual stream that it reads; nothing else needs it."""
    return shapes.impl != "local" or shapes.model.normalization != "RMSNorm" or shapes.element == FLOAT32


def norm_backward(shapes: Shapes) -> int:
    """The most that a norm's backward pass holds besides what was kept, incoming gradient included."""
    if shapes.impl == "local" and shapes.model.normalization == "RMSNorm":
        # There are five float32 temporaries of single operations; the normalised input is freed by then.
        return 4 * shapes.shard * shapes.model.hidden_size * FLOAT32
    return 2 * shapes.hidden


def attention_kept(shapes: Shapes, *, recomputed: bool, fp8: bool) -> int:
    """What core attention and its projection keep: everything from the product of queries, keys and values to the
    projection's input, which is the attention's output."""
    query, key = shapes.query, shapes.key
    # Values are a view of the product, so all of the product stays.
    product = query + 2 * key
    log_sums = shapes.tokens * shapes.model.num_attention_heads // shapes.tensor * FLOAT32
    projected = shapes.linear_input(query, fp8=True) if fp8 else 0
    # The product holds the attention heads that share a key side by side; where there are several, queries are copied.
    copied = query if shapes.model.num_query_groups != shapes.model.num_attention_heads else 0
    rotated = query + key if shapes.model.position_embedding_type == "rope" else copied
    if recomputed:
        return product + copied + query + projected
    if shapes.impl == "transformer_engine" and shapes.key_tokens != shapes.tokens:
        # Two calls gather their rows and put outputs back in order; they need neither product nor rotated queries.
        gathered = 2 * key * shapes.key_tokens // shapes.tokens
        return query + gathered + log_sums + 2 * query + projected
    return product + rotated + log_sums + query + projected


def mlp_kept(shapes: Shapes, *, fp8: bool) -> int:
    """What the feed-forward layer keeps after its norm: input, first product, activation."""
    inputs = shapes.linear_input(shapes.hidden, fp8=fp8)
    parts = 0
    if shapes.model.gated_linear_unit and shapes.model.hidden_act != "silu":
        parts = shapes.ffn  # the activation before the gate: our fused kernel is for silu only
    return inputs + shapes.fc1 + parts + shapes.linear_input(shapes.ffn, fp8=fp8)


def layer_kept(shapes: Shapes, *, selective: bool = False, fp8: bool = False, with_input: bool = True) -> int:
    """What a layer keeps for its backward pass.

    Args:
        selective: whether the core attention is computed again.
        fp8: whether its linear maps keep their inputs in FP8.
        with_input: whether to count the layer's input; the kept input of a recomputed layer is counted elsewhere.
    """
    norms = norm_kept(shapes, with_input=with_input) + norm_kept(shapes)
    heads = 0
    if shapes.model.qk_layernorm:
        # The inputs of the norms over attention heads are the product and the copied queries.
        heads = (shapes.query + shapes.key) // shapes.element * FLOAT32 * (1 if shapes.element == FLOAT32 else 2)
        if shapes.impl != "local":
            heads = shapes.query
    attention = attention_kept(shapes, recomputed=selective, fp8=fp8)
    return norms + heads + shapes.linear_input(shapes.hidden, fp8=fp8) + attention + mlp_kept(shapes, fp8=fp8)


def layer_backward(shapes: Shapes, *, fp8: bool = False) -> int:
    """The most that a layer's backward pass adds to what was kept before it, incoming gradient (`hidden`) included: the
    largest of several points. A weight gradient exists until it is added to its float32 buffer."""
    model, ffn, fc1, hidden = shapes.model, shapes.ffn, shapes.fc1, shapes.hidden
    weight = model.hidden_size * model.ffn_hidden_size // shapes.tensor * shapes.element
    activation = shapes.linear_input(ffn, fp8=fp8)
    inputs = shapes.linear_input(hidden, fp8=fp8)
    scattered = hidden if shapes.gathered else 0
    points = (
        # The second map makes gradients of its input and weight.
        hidden + shapes.gathered + ffn + weight,
        hidden + ffn + shapes.added(weight),
        # The activation has its gradient, that of the first product, and a temporary of the activation's size.
        -activation + hidden + ffn + fc1 + (ffn if model.gated_linear_unit else 0),
        # The first map has the gradients of the product, of the input, and of the weight.
        -activation - fc1 + hidden + fc1 + shapes.whole_hidden + scattered + weight * fc1 // ffn,
        -activation - fc1 + hidden + shapes.whole_hidden + shapes.added(weight * fc1 // ffn),
        # The norm works beside the gradient of the residual branch.
        -activation - fc1 - inputs + hidden + norm_backward(shapes),
    )
    return max(0, *points)


def layer_forward(shapes: Shapes) -> int:
    """The most that a layer holds in a forward pass that keeps nothing, its input included."""
    query, key, hidden = shapes.query, shapes.key, shapes.hidden
    rotated = query + key if shapes.model.position_embedding_type == "rope" else 0
    copied = query if shapes.model.num_query_groups != shapes.model.num_attention_heads else 0
    attention = 2 * hidden + query + 2 * key + copied + rotated + query
    return max(attention, 3 * hidden + shapes.fc1 + shapes.ffn)


@dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """What final norm and head hold besides what the layers keep."""

    kept: int
    """What stays between forward and backward pass."""
    forward: int
    """The most in the forward pass, `kept` included."""
    backward: int
    """The most in the backward pass, `kept` included."""
    tied_gradient: int
    """The gradient of a tied weight, which waits for the embedding's until the end of the backward pass; else 0."""
    workspace: int
    """Logits and gradients of the log-probabilities, in `forward` or `backward`, whichever has more."""


def head_memory(shapes: Shapes, head: Head, *, known_gradient: bool, tied: bool) -> HeadMemory:
    """Memory of final norm and head in training."""
    norm = norm_kept(shapes)
    # This is the norm's output, and its gathered copy where sequence parallelism had split it.
    states = shapes.hidden + shapes.gathered
    # The gradient of selected rows is as large as the states that they were selected from.
    back = norm + max(states, norm_backward(shapes))
    if head == "reward":
        return HeadMemory(kept=norm, forward=norm + states, backward=back, tied_gradient=0, workspace=0)
    forward, kept, backward = _logprob_workspace(shapes, known_gradient=known_gradient)
    return HeadMemory(
        kept=norm + kept,
        forward=norm + states + forward,
        backward=max(norm + backward, back + (shapes.head_weight * shapes.element if tied else 0)),
        tied_gradient=shapes.head_weight * shapes.element if tied else 0,
        workspace=max(forward, backward),
    )


def _logprob_workspace(shapes: Shapes, *, known_gradient: bool) -> tuple[int, int, int]:
    """Memory of log-probabilities with their gradients (`logprobs.py`): the most in the forward pass, what stays, and
    the most in the backward pass."""
    element, entry = shapes.element, FLOAT32 + _lower(shapes)
    selected = shapes.targets * shapes.model.hidden_size * element
    weight = shapes.head_weight * element
    chunk, rows = shapes.model.logprob_chunk_size, shapes.rows
    if known_gradient:
        positions = positions_of_whole_rows(rows, chunk)
        buffer = min(positions, shapes.targets) * rows * entry
        # Several blocks of low precision are summed in float32.
        summed = shapes.head_weight * FLOAT32 if shapes.targets > positions and _lower(shapes) else 0
        grads = summed + max(shapes.added(min(2 * PRODUCT_SIZE, weight)), weight) if summed else weight
        return 2 * selected + buffer + grads, selected + weight, selected + weight
    positions, ids = block_shape(shapes.targets, rows, chunk)
    buffer = positions * ids * entry
    stays = positions * ids * FLOAT32 if positions == shapes.targets and ids == rows else 0
    grads = shapes.targets * shapes.model.hidden_size * FLOAT32 + weight
    if _lower(shapes):
        summed = ids * shapes.model.hidden_size if shapes.targets > positions else 0
        product = max(selected, summed * element)
        grads += summed * FLOAT32 + shapes.added(min(2 * PRODUCT_SIZE, product))
    return selected + buffer, selected + stays, selected + buffer + grads


def scoring_workspace(shapes: Shapes) -> int:
    """Memory of log-probabilities without gradients: the selected states and the buffer of logits."""
    positions, ids = block_shape(shapes.targets, shapes.rows, shapes.model.logprob_chunk_size)
    selected = shapes.targets * shapes.model.hidden_size * shapes.element
    return selected + positions * ids * (FLOAT32 + _lower(shapes))


def _lower(shapes: Shapes) -> int:
    """Bytes of a logit before it is cast to float32; 0 where logits are float32 from the start."""
    return 0 if shapes.element == FLOAT32 else shapes.element


def embedding_backward(shapes: Shapes, *, tied: bool) -> int:
    """The embedding's gradient beside the incoming gradient, and that of a tied output layer, which waited for it."""
    weight = shapes.head_weight * shapes.element
    # The two gradients of a tied weight are summed before they are added to the buffer.
    return shapes.hidden + shapes.gathered + max(2 * weight if tied else 0, shapes.added(weight))
