"""One forward pass of the trunk through all pipeline stages, without a schedule."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_brain.models.gpt import PolicyModel
from megatron_brain.runtime.parallel import Parallel


def trunk_forward(
    chunks: Sequence[PolicyModel], parallel: Parallel, tokens: Tensor, position_ids: Tensor, layout: object
) -> Tensor | None:
    """Hidden states `[T, 1, h]` (`[T/tp, 1, h]` with sequence parallelism) on the last pipeline stage; None elsewhere.

    All pipeline stages call this together, with the same tokens, positions and layout. Hidden states go through
    interleaved chunks in the order of their layers, round the ring of pipeline stages.

    Args:
        chunks: this pipeline stage's chunks of the model, in eval mode.
        tokens: `[1, T]` int64; with sequence parallelism T is a multiple of the tensor-parallel size.
        position_ids: `[1, T]` int64.
        layout: attention layout, as in `models.attention`.
    """
    ring = dist.get_process_group_ranks(parallel.groups.pp)
    previous, following = (ring[(parallel.pp_rank + step) % parallel.pp_size] for step in (-1, 1))
    for chunk in chunks:
        if not chunk.pre_process:
            config = chunk.config
            length = tokens.size(1) // (parallel.tp_size if config.sequence_parallel else 1)
            received = torch.empty(length, 1, config.hidden_size, dtype=config.pipeline_dtype, device=tokens.device)
            dist.recv(received, src=previous, group=parallel.groups.pp)
            chunk.set_input_tensor(received)
        hidden = chunk.trunk(tokens, position_ids, layout)
        chunk.set_input_tensor(None)
        if not chunk.post_process:
            dist.send(hidden.contiguous(), dst=following, group=parallel.groups.pp)
    return hidden if chunks[-1].post_process else None
