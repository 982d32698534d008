"""What a checkpoint stores of a model, an optimizer and the random generators, and under which global names.

Names and shapes do not depend on the layout. Layer numbers are those of the whole model, shapes are those of whole
tensors without padding of the vocabulary, and the optimizer's state is named after its weight, whether or not it is
distributed over replicas.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_brain.checkpointing.boxes import Box, BoxPart, range_boxes
from megatron_brain.models.fp8.state import scales
from megatron_brain.models.fp8.weights import in_full, outlined
from megatron_brain.models.initialize import VOCABULARY_WEIGHTS, sharded_tensors
from megatron_brain.models.provider import Chunk
from megatron_brain.runtime.parallel import Parallel

NOT_WEIGHTS = ("optimizer.", "random.", "fp8.")
"""Beginnings of the names of tensors that are not weights of the model."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Block:
    """A block of a global tensor that lies in one piece in a parameter, from the parameter's flat element `start`."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    data: Tensor
    start: int = 0


def model_boxes(chunks: Sequence[Chunk]) -> list[Box]:
    """The weights of this rank's chunks. Writing to a box writes to its weight, unless this exists only in FP8: see
    `models.fp8.weights`."""
    return [
        Box(key=block.key, shape=block.shape, offset=block.offset, data=block.data)
        for chunk in chunks
        for block in _blocks(chunk)
    ]


@dataclass(frozen=True, kw_only=True)
class WeightBox:
    """A box of a weight of this rank, in the parameter's flat elements from `start` on."""

    part: BoxPart
    parameter: Tensor
    start: int

    def read(self) -> Tensor:
        """The values: a view of the parameter, or a copy where it exists only in FP8."""
        flat = in_full(self.parameter).detach().view(-1)
        return flat[self.start : self.start + math.prod(self.part.size)].view(self.part.size)


def weight_boxes(chunks: Sequence[Chunk]) -> list[WeightBox]:
    """The weights of this rank's chunks, as the chunks compute with them. Nothing is read before it is asked for."""
    return [
        WeightBox(
            part=BoxPart(key=block.key, dtype=parameter.dtype, shape=block.shape, offset=block.offset, size=block.size),
            parameter=parameter,
            start=block.start,
        )
        for chunk in chunks
        for parameter, blocks in _blocks_by_parameter(chunk)
        for block in blocks
    ]


@torch.no_grad()
def zero_vocabulary_padding(chunks: Sequence[Chunk]) -> None:
    """Set the rows that pad the vocabulary to zero. Checkpoints do not hold them."""
    for chunk in chunks:
        for sharded in sharded_tensors(chunk):
            if sharded.key.endswith(VOCABULARY_WEIGHTS):
                assert sharded.data is not None
                sharded.data[max(0, chunk.true_vocab_size - sharded.global_offset[0]) :].zero_()


def optimizer_boxes(optimizer: MegatronOptimizer, chunks: Sequence[Chunk]) -> list[Box]:
    """This rank's share of Adam's moments and, in mixed precision, of the float32 weights. Writing to them has effect.

    Before the first update there are no moments: they are made as zeros.
    """
    _make_moments(optimizer)
    return [
        box
        for held in _held_weights(optimizer, chunks)
        for name, flat in _states(held.part, held.parameter, held.main)
        for block in held.blocks
        for box in _cut(block, f"optimizer.{name}.{block.key}", flat, held.start, held.end)
    ]


def stored_weights(optimizer: MegatronOptimizer | None, chunks: Sequence[Chunk]) -> tuple[list[Box], list[Box]]:
    """The weights that this rank stores: first those that all data-parallel replicas have; then, for weights that exist
    only in FP8, the values before rounding that this rank's optimizer has."""
    with outlined(chunks):
        shared = [box for box in model_boxes(chunks) if not box.data.is_meta]
    if not any(is_float8tensor(weight) for chunk in chunks for weight in chunk.parameters()):
        return shared, []
    assert optimizer is not None, "weights in FP8 alone are saved from the optimizer"
    return shared, [
        box
        for held in _held_weights(optimizer, chunks)
        if is_float8tensor(held.parameter)
        for block in held.blocks
        for box in _cut(block, block.key, held.main.detach().to(held.parameter.dtype).view(-1), held.start, held.end)
    ]


def optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Number of updates that Adam has counted; 0 on a rank that holds no weights."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
        for state in part.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
    return 0


def set_optimizer_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set Adam's count of updates. A fused Adam keeps it for each group, torch's Adam for each weight."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if not _counts_by_weight(part):
                group["step"] = steps
                continue
            for weight in group["params"]:
                device = weight.device if group.get("fused") or group.get("capturable") else "cpu"
                part.optimizer.state[weight]["step"] = torch.tensor(float(steps), device=device)


def random_boxes(state: dict[str, Tensor], parallel: Parallel) -> list[Box]:
    """This rank's row of every random generator's state. Writing to the boxes writes to `state`."""
    sizes = (parallel.pp_size, parallel.tp_size, parallel.dp_size)
    place = (parallel.pp_rank, parallel.tp_rank, parallel.dp_rank)
    return [
        Box(key=f"random.{name}", shape=(*sizes, len(value)), offset=(*place, 0), data=value.view(1, 1, 1, -1))
        for name, value in state.items()
    ]


def fp8_boxes(chunks: Sequence[Chunk]) -> list[Box]:
    """FP8 scales that outlive a step, and the maxima that they follow from. Writing to them has effect.

    All tensor- and data-parallel ranks hold the same ones, so they fit every layout.
    """
    return [
        Box(key=f"fp8.{name}", shape=tuple(values.shape), offset=(0,) * values.dim(), data=values)
        for name, values in scales(chunks).items()
    ]


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    # A part without parameters has no optimizer inside: a pipeline stage may have none for it.
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]


def _counts_by_weight(part: MegatronOptimizer) -> bool:
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _make_moments(optimizer: MegatronOptimizer) -> None:
    """Give every weight the state that it has before the first update."""
    empty = False
    for part in _parts(optimizer):
        for weight in (weight for group in part.optimizer.param_groups for weight in group["params"]):
            state = part.optimizer.state[weight]
            for name in (name for name in _MOMENTS if name not in state):
                empty = True
                state[name] = torch.zeros_like(weight, dtype=torch.float32).detach()
    if empty:
        # torch's Adam makes no state for a weight that has any: so the count must be there too.
        set_optimizer_steps(optimizer, optimizer_steps(optimizer))


@dataclass(frozen=True, kw_only=True)
class _HeldWeight:
    """A parameter with its blocks, and the tensor `main` in which `part` updates its flat elements [start, end)."""

    part: MegatronOptimizer
    parameter: Tensor
    blocks: list[_Block]
    main: Tensor
    start: int
    end: int


def _held_weights(optimizer: MegatronOptimizer, chunks: Sequence[Chunk]) -> Iterator[_HeldWeight]:
    """The parameters that the optimizer's parts on this rank update."""
    blocks_by_parameter = [found for chunk in chunks for found in _blocks_by_parameter(chunk)]
    for part in _parts(optimizer):
        owned = {id(weight) for group in part.optimizer.param_groups for weight in group["params"]}
        for parameter, blocks in blocks_by_parameter:
            main, start, end = _held(part, parameter)
            if main is not None and id(main) in owned:
                yield _HeldWeight(part=part, parameter=parameter, blocks=blocks, main=main, start=start, end=end)


def _blocks(chunk: Chunk) -> list[_Block]:
    """Every weight of a chunk in blocks, without the rows that pad the vocabulary."""
    blocks = []
    for sharded in sharded_tensors(chunk):
        prepended = sharded.prepend_axis_num
        shape, offset = list(sharded.global_shape[prepended:]), tuple(sharded.global_offset[prepended:])
        assert sharded.data is not None
        data = sharded.data.detach()
        if sharded.key.endswith(VOCABULARY_WEIGHTS):
            shape[0] = chunk.true_vocab_size
            data = data[: max(0, shape[0] - offset[0])]
        if data.numel():
            blocks.append(_Block(_name(sharded), tuple(shape), offset, tuple(data.shape), data))
    return blocks


def _name(sharded: ShardedTensor) -> str:
    """The global name. It gets the layer's number where megatron-core stores layers along an axis of the tensor."""
    key: str = sharded.key
    if not sharded.prepend_axis_num:
        return key
    assert sharded.prepend_axis_num == 1 and "layers." in key, f"unknown stacking of {key}"
    return key.replace("layers.", f"layers.{sharded.global_offset[0]}.", 1)


def _blocks_by_parameter(chunk: Chunk) -> Iterator[tuple[Parameter, list[_Block]]]:
    """Each parameter with the blocks that lie in it. Their places in memory tell which these are."""
    with outlined([chunk]) as outlines:
        parameters = sorted(chunk.parameters(), key=_place)
        blocks = _blocks(chunk)
    starts = [_place(parameter) for parameter in parameters]
    found: dict[int, list[_Block]] = {i: [] for i in range(len(parameters))}
    for block in blocks:
        memory, first = _place(block.data)
        index = bisect.bisect_right(starts, (memory, first)) - 1
        parameter = parameters[index]
        start = first - starts[index][1]
        inside = memory == starts[index][0] and start + block.data.numel() <= parameter.numel()
        assert inside and block.data.is_contiguous(), f"{block.key} does not lie in one piece inside of a parameter"
        found[index].append(_Block(block.key, block.shape, block.offset, block.size, block.data, start))
    for index, parameter in enumerate(parameters):
        yield outlines.get(id(parameter), parameter), found[index]


def _place(tensor: Tensor) -> tuple[int, int]:
    """The memory that a tensor is in, even if it is not allocated, and the tensor's first element there."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _held(part: MegatronOptimizer, parameter: Parameter) -> tuple[Tensor | None, int, int]:
    """The float32 tensor that Adam updates for a parameter (None: not here), and its range [start, end) of elements."""
    if not isinstance(part, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter), 0, parameter.numel()
    if parameter not in part.model_param_group_index_map:
        return None, 0, 0
    group, place = part.model_param_group_index_map[parameter]
    piece = part._get_model_param_range_map(parameter)["param"]
    return part.optimizer.param_groups[group]["params"][place], piece.start, piece.end


def _states(part: MegatronOptimizer, parameter: Tensor, main: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name and flat values of each tensor that the optimizer has for a weight."""
    if main.dtype != parameter.dtype:
        yield "fp32_param", main.detach().view(-1)
    for name in _MOMENTS:
        yield name, part.optimizer.state[main][name].view(-1)


def _cut(block: _Block, key: str, flat: Tensor, start: int, end: int) -> Iterator[Box]:
    """The boxes of a block that lie in `flat`, which holds the parameter's elements [start, end)."""
    first = max(start, block.start)
    last = min(end, block.start + math.prod(block.size))
    if first >= last:
        return
    place = first - start
    for offset, size in range_boxes(block.size, first - block.start, last - block.start):
        count = math.prod(size)
        yield Box(
            key=key,
            shape=block.shape,
            offset=tuple(a + b for a, b in zip(block.offset, offset, strict=True)),
            data=flat[place : place + count].view(size),
        )
        place += count
