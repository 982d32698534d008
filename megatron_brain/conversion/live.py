"""Writes the policy that a run trains as a Hugging Face directory, from the weights of all ranks at any layout.

Every pipeline stage writes the weights that it computes with. Its data-parallel replicas divide the layers, and the
tensor-parallel ranks of a replica divide the tensors of a layer: the rank that writes a tensor is sent the other ranks'
parts of it. Each rank writes one file, layer by layer, so that it holds at most one layer besides its own weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_brain.checkpointing.boxes import BoxPart
from megatron_brain.checkpointing.state import WeightBox, weight_boxes
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.family import Family
from megatron_brain.conversion.hf_files import as_json, hf_config, index_json
from megatron_brain.conversion.live_plan import Piece, Stage, plan
from megatron_brain.conversion.registry import family_for_export
from megatron_brain.conversion.safetensors_files import INDEX
from megatron_brain.conversion.safetensors_writer import SafetensorsWriter
from megatron_brain.data.tokenizer import Tokenizer
from megatron_brain.errors import ConfigError
from megatron_brain.models.gpt import PolicyModel
from megatron_brain.runtime.agreement import raise_on_all
from megatron_brain.runtime.parallel import Parallel


def untied(model: ModelConfig) -> tuple[ModelConfig, Family]:
    """The model with an output layer of its own, as `write_live` writes it, and the family that expresses it.

    Raises:
        ConfigError: no family, or not the one that `hf_model_type` names, can have such a model.
    """
    written = dataclasses.replace(model, untie_embeddings_and_output_weights=True)
    return written, family_for_export(written)


@torch.no_grad()
def write_live(
    chunks: Sequence[PolicyModel], parallel: Parallel, model: ModelConfig, folder: Path, *, tokenizer: Tokenizer
) -> None:
    """Write config.json, the weights and their index. All ranks call it together.

    The output layer is always written, and the model is not said to be tied: an inference server that was started with
    a tied model may keep its old output layer when it takes over new weights. Weights that exist only in FP8 are
    written as the values that they represent. Nothing is synced to the disk, but what this function wrote can be read
    on other machines when it returns.

    Args:
        chunks: this rank's whole weights: those of `Trainer.gathered_chunks`.
        model: the architecture, resolved. The weights are written in bfloat16 if `bf16` is set, else in float32.
        folder: one that exists, is empty and is seen by all ranks.
        tokenizer: its ids go into config.json. Its files are not written.

    Raises:
        ConfigError: the model cannot be written untied; see `untied`.
        AgreedError: a rank could not write, such as on a full disk. All ranks raise it, and it names the file.
    """
    written, family = untied(model)
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    boxes = {box.part: box for box in weight_boxes(chunks)}
    held = [set(boxes)]
    if parallel.tp_size > 1:
        held = [set() for _ in range(parallel.tp_size)]
        dist.all_gather_object(held, set(boxes), group=parallel.groups.tp)
    stage = Stage(
        family=family,
        model=model,
        untied=written,
        is_first=any(chunk.pre_process for chunk in chunks),
        is_last=any(chunk.post_process for chunk in chunks),
        held=held,
    )
    rounds = plan(stage, replica=parallel.dp_rank, replicas=parallel.dp_size)
    shapes = {
        name: shape
        for pieces in rounds
        for piece in pieces
        if piece.writer == parallel.tp_rank
        for name, shape in piece.tensors.items()
    }
    file = folder / f"model-{parallel.rank + 1:05d}-of-{parallel.world_size:05d}.safetensors"
    with _Output(file, shapes, dtype) as output:
        for pieces in rounds:
            _write_round(pieces, boxes, dtype, parallel, output)
    raise_on_all(output.problem, parallel)
    config = hf_config(family, written, "policy", dtype, tokenizer)
    _write_small_files(folder, config, shapes, file.name, dtype, parallel)


class _Output:
    """This rank's file; none where there is nothing to write. After its first error it takes values and drops them, so
    that this rank goes on to send to the others what they wait for.

    Attributes:
        problem: the first error, in words for the user.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.problem: ConfigError | None = None
        self._path, self._shapes, self._dtype = path, shapes, dtype
        self._file: SafetensorsWriter | None = None

    def __enter__(self) -> "_Output":
        if self._shapes:
            self.problem = _problem_of(self._open, self._path)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._file is not None:
            problem = _problem_of(self._file.close, self._path)
            self.problem = self.problem or problem

    def write(self, values: Tensor) -> None:
        """Append values, unless there was an error."""
        if self._file is not None and self.problem is None:
            self.problem = _problem_of(partial(self._file.write, values), self._path)

    def _open(self) -> None:
        self._file = SafetensorsWriter(self._path, self._shapes, self._dtype)


def _problem_of(action: Callable[[], object], path: Path) -> ConfigError | None:
    """Do an action. Returns what the file system had against it, in words for the user."""
    try:
        action()
    except OSError as error:
        return ConfigError(f"{path}: {error.strerror or error}: free space there, or name another folder")
    return None


def _write_round(
    pieces: Sequence[Piece], boxes: Mapping[BoxPart, WeightBox], dtype: torch.dtype, parallel: Parallel, output: _Output
) -> None:
    """Write the pieces that are this rank's, and send its parts of the others. No values of a round outlive it."""
    mine = _collected(pieces, boxes, dtype, parallel)
    while mine:
        piece, values = mine.pop(0)
        for tensor in piece.split(values):
            output.write(tensor)


def _collected(
    pieces: Sequence[Piece], boxes: Mapping[BoxPart, WeightBox], dtype: torch.dtype, parallel: Parallel
) -> list[tuple[Piece, Tensor]]:
    """The pieces that this rank writes, with their values. Meanwhile it sends its parts of the others."""
    mine: list[tuple[Piece, Tensor]] = []
    transfers: list[dist.P2POp] = []
    scattered: list[tuple[Tensor, Tensor]] = []
    group = parallel.groups.tp
    for piece in pieces:
        overlaps = list(piece.overlaps())
        own = {part: boxes[part].read()[rows].to(dtype) for rank, part, rows, _ in overlaps if rank == parallel.tp_rank}
        if piece.writer != parallel.tp_rank:
            peer = dist.get_global_rank(group, piece.writer)
            transfers += [dist.P2POp(dist.isend, given, peer, group) for given in own.values()]
            continue
        if len(own) == len(overlaps) == 1:
            mine.append((piece, *own.values()))
            continue
        whole = torch.empty(piece.shape, dtype=dtype, device=parallel.device)
        mine.append((piece, whole))
        for rank, part, _, place in overlaps:
            target = whole[place]
            if part in own:
                target.copy_(own[part])
                continue
            received = (
                target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
            )
            transfers.append(dist.P2POp(dist.irecv, received, dist.get_global_rank(group, rank), group))
            if received is not target:
                scattered.append((target, received))
    for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
        transfer.wait()
    for target, received in scattered:
        target.copy_(received)
    return mine


def _write_small_files(
    folder: Path, config: dict, mine: Mapping[str, tuple[int, ...]], file: str, dtype: torch.dtype, parallel: Parallel
) -> None:
    """Write the index and then config.json: without it nothing takes the folder for a model. All ranks call it."""
    told = parallel.gather_over_world((file, dict(mine)))
    file_of = {name: file for file, shapes in told for name in shapes}
    total = sum(math.prod(shape) for _, shapes in told for shape in shapes.values()) * dtype.itemsize

    def write() -> None:
        (folder / INDEX).write_text(index_json({"total_size": total}, file_of), encoding="utf-8")
        (folder / "config.json").write_text(as_json(config), encoding="utf-8")

    raise_on_all(_problem_of(write, folder) if parallel.is_writer else None, parallel)
