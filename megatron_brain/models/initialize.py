"""Random weights that are the same at every layout."""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import nn

from megatron_brain.config.model import ModelConfig

VOCABULARY_WEIGHTS = ("word_embeddings.weight", "output_layer.weight")
"""Endings of the names of weights with a row for each token id. Their last rows may be padding."""

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(module: nn.Module, model: ModelConfig, *, seed: int) -> None:
    """Fill `module` from the normal distribution (norms: ones, biases: zeros).

    Every weight is drawn whole, from a generator seeded by `seed` and the weight's global name and layer; then this
    rank's slice is kept. So one process and every tensor- and pipeline-parallel layout start from equal weights, except
    for padding of the vocabulary (zeros). Weights whose output adds to the residual stream are divided by
    sqrt(2 x layers).
    """
    for sharded in sharded_tensors(module):
        if sharded.data is None or sharded.data.numel() == 0 or not sharded.data.is_floating_point():
            continue
        # This comes first: a norm inside of a linear layer names its bias layer_norm_bias.
        if sharded.key.endswith("bias"):
            sharded.data.zero_()
        elif "norm" in sharded.key:
            sharded.data.fill_(1.0)
        else:
            sharded.data.copy_(_slice_of_whole(sharded, model, seed=seed))


def mark_tensor_parallel(module: nn.Module) -> None:
    """Mark every weight that is split over tensor-parallel ranks.

    megatron-core 0.16 does so only while it draws its own initial weights, which we replace; 0.19 always does. Both
    mark biases when they make them. The gradient norm would count an unmarked weight on one rank only.
    """
    split_along = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for part in module.modules():
        dims = [dim for kind, dim in split_along.items() if isinstance(part, kind)]
        if dims and part.weight is not None and not hasattr(part.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(part.weight, is_parallel=True, dim=dims[0], stride=1)


def sharded_tensors(module: nn.Module) -> list[ShardedTensor]:
    """Every weight of this rank with its place in the whole model. Writing to its `data` writes to the parameter."""
    found: list[ShardedTensor] = []
    for value in module.sharded_state_dict().values():
        if isinstance(value, ShardedTensorFactory):
            # A gated weight is stored as two halves.
            built = value.build()
            found += built if isinstance(built, list) else list(built.values())
        elif isinstance(value, ShardedTensor):
            found.append(value)
    return found


def _slice_of_whole(sharded: ShardedTensor, model: ModelConfig, *, seed: int) -> torch.Tensor:
    prepended = sharded.prepend_axis_num
    place, offset = sharded.global_offset[:prepended], sharded.global_offset[prepended:]
    whole_shape = list(sharded.global_shape[prepended:])
    padded_rows = whole_shape[0]
    if sharded.key.endswith(VOCABULARY_WEIGHTS):
        whole_shape[0] = model.vocab_size
    std = model.init_method_std
    if sharded.key.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * model.num_layers)
    name = f"{seed}:{sharded.key}:{place}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
    whole = torch.zeros([padded_rows, *whole_shape[1:]])
    whole[: whole_shape[0]] = torch.randn(whole_shape, generator=generator) * std
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, sharded.data.shape[-len(offset) :], strict=True))]
