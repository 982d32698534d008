"""The weights of a model chunk by their place in the whole model, whatever the layout or the layer spec."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megatron_brain.conversion.family import LAYERS
from megatron_brain.models.initialize import sharded_tensors


@dataclass(frozen=True, kw_only=True)
class Piece:
    """This rank's share of a weight.

    Attributes:
        name: as in `Weight.name`.
        layer: global number of the layer from 0, or None.
        place: where `data` stands in the whole tensor.
        shape: of the whole tensor, vocabulary padding included.
        data: a view of the parameter: what is written to it is written to the model.
    """

    name: str
    layer: int | None
    place: tuple[slice, ...]
    shape: tuple[int, ...]
    data: Tensor


def pieces(chunk: nn.Module) -> Iterator[Piece]:
    """All weights of a chunk; a gated weight comes as two pieces, a tied output layer as the embedding."""
    return map(_piece, sharded_tensors(chunk))


def _piece(sharded: ShardedTensor) -> Piece:
    prepended = sharded.prepend_axis_num
    offset, data = sharded.global_offset[prepended:], sharded.data.detach()
    return Piece(
        name=sharded.key,
        layer=sharded.global_offset[0] if sharded.key.startswith(LAYERS) else None,
        place=tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True)),
        shape=tuple(sharded.global_shape[prepended:]),
        data=data,
    )
