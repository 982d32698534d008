"""Compares the weights that several processes hold, bit by bit."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_brain.models.fp8.weights import in_full
from megatron_brain.models.parameter_names import global_parameters
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel

_SHOWN = 5
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(chunks: Sequence[Chunk], parallel: Parallel) -> None:
    """Check that weights are equal where they must be: all weights over replicas, weights that are not split (norms,
    the reward head) over tensor-parallel ranks, and a tied embedding on the first and last pipeline stage.

    Every rank gathers eight bytes per weight. megatron-core's `check_param_hashes_across_dp_replicas` copies all
    weights to the host for SHA-1 and compares data-parallel ranks only. It logs names; this raises on all ranks.

    Raises:
        RuntimeError: on all ranks, if any weight differs anywhere. The message names the weight and the ranks.
    """
    parameters = dict(global_parameters(chunks))
    unsplit = {name: p for name, p in parameters.items() if not getattr(p, "tensor_model_parallel", False)}
    found = _differing(parameters, parallel.groups.dp, "data-parallel replicas")
    found += _differing(unsplit, parallel.groups.tp, "tensor-parallel ranks")
    found += _differing(_tied_embedding(chunks, parallel), parallel.groups.embd, "the first and last pipeline stage")
    (differ,) = parallel.any_rank(bool(found))
    if not differ:
        return
    lines = list(dict.fromkeys(line for lines in parallel.gather_over_world(found) for line in lines))
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise RuntimeError(
        f"weights that must be equal differ: {'; '.join(lines[:_SHOWN])}{more}. A device, its memory or a reduction "
        "went wrong: take the machine of the rank that stands alone out and resume from a checkpoint made before"
    )


def bit_sum(weight: Tensor) -> Tensor:
    """Sum of the weight's elements, read as integers (int64 modulo 2**64). Any single flipped bit changes the sum."""
    return in_full(weight.detach()).view(_BITS[weight.element_size()]).sum(dtype=torch.int64)


def _tied_embedding(chunks: Sequence[Chunk], parallel: Parallel) -> dict[str, nn.Parameter]:
    """The embedding, if it is also the output layer and the two are on different ranks."""
    ends = [chunk for chunk in chunks if chunk.pre_process or chunk.post_process]
    if parallel.pp_size == 1 or not ends or not ends[0].share_embeddings_and_output_weights:
        return {}
    return {"embedding.word_embeddings.weight": ends[0].shared_embedding_or_output_weight()}


def _differing(parameters: dict[str, nn.Parameter], group: dist.ProcessGroup | None, who: str) -> list[str]:
    """One line for every weight that is not equal on all ranks of the group."""
    if not parameters or group is None or group.size() == 1:
        return []
    mine = torch.stack([bit_sum(parameter) for parameter in parameters.values()])
    sums = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sums, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    table = torch.stack(sums, dim=1)
    lines = []
    for index in (table != table[:, :1]).any(dim=1).nonzero()[:, 0].tolist():
        camps: dict[int, list[int]] = {}
        for rank, value in zip(ranks, table[index].tolist(), strict=True):
            camps.setdefault(value, []).append(rank)
        sides = " against ".join(", ".join(map(str, camp)) for camp in sorted(camps.values(), key=len))
        lines.append(f"{list(parameters)[index]} over {who} (global ranks {sides})")
    return lines
