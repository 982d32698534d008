"""Divides the weights of a policy among the ranks that write them. Every rank computes the same division."""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_brain.checkpointing.boxes import BoxPart, tiles
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.family import Family, Weight
from megatron_brain.conversion.streaming import BLOCK_ELEMENTS

Held = Sequence[Collection[BoxPart]]
"""The boxes of weights that each tensor-parallel rank of a pipeline stage has."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a weight that one tensor-parallel rank writes at one time.

    Attributes:
        weight, layer: the weight's row in the family's table, and its layer.
        model: the model's sizes.
        rows: [start, end) of its rows. Only a weight that stacks its tensors is written in parts, each of one tensor.
        tensors: shapes of the tensors that the rows belong to, by their names in the directory.
        writer: the tensor-parallel rank that writes it.
        parts: boxes that cover the weight once, each with the rank that gives it to the writer.
    """

    weight: Weight
    layer: int | None
    model: ModelConfig
    rows: tuple[int, int]
    tensors: dict[str, tuple[int, ...]]
    writer: int
    parts: tuple[tuple[int, BoxPart], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows."""
        start, end = self.rows
        return (end - start, *self.parts[0][1].shape[1:])

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """The tensors that the rows are, or the part of one tensor that they are."""
        fusion = self.weight.fusion
        return [values] if fusion.stacks else fusion.split(values, self.model)

    def overlaps(self) -> Iterator[tuple[int, BoxPart, slice, tuple[slice, ...]]]:
        """Each box that has some of the rows: its rank, the box, which of its rows these are, their place in the piece.

        All ranks get them in the same order.
        """
        for rank, part in self.parts:
            first, last = max(self.rows[0], part.offset[0]), min(self.rows[1], part.end[0])
            if first < last:
                others = (slice(start, end) for start, end in zip(part.offset[1:], part.end[1:], strict=True))
                place = (slice(first - self.rows[0], last - self.rows[0]), *others)
                yield rank, part, slice(first - part.offset[0], last - part.offset[0]), place


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the plan must know of a pipeline stage of a model.

    Attributes:
        family: the one to write.
        model: the model that is trained.
        untied: the same with an output layer of its own.
        is_first, is_last: whether the stage computes the embedding, and the output layer.
        held: see `Held`.
    """

    family: Family
    model: ModelConfig
    untied: ModelConfig
    is_first: bool
    is_last: bool
    held: Held

    def entries(self) -> Iterator[tuple[Weight, int | None, str]]:
        """The weights that this stage writes, with their layers and the names of their values in the chunks.

        With pipeline parallelism the last stage of a tied model has a copy of the embedding, which is its output layer.
        """
        keys = {part.key for parts in self.held for part in parts}
        for weight, layer in self.family.entries(self.untied, "policy"):
            key = self.family.stored_key(weight, layer, self.model)
            is_here = {"embedding": self.is_first, "output": self.is_last}.get(self._place(weight), key in keys)
            if is_here:
                yield weight, layer, key

    def _place(self, weight: Weight) -> str:
        if weight in self.family.embedding:
            return "embedding"
        return "output" if weight == self.family.output else "layer"


def plan(stage: Stage, *, replica: int, replicas: int) -> list[list[Piece]]:
    """The pieces that the tensor-parallel ranks of a data-parallel replica write, in rounds of at most a layer each.

    The replicas divide the layers, and the matrices of the vocabulary, by size. The ranks of a replica divide the
    tensors of each layer by size.
    """
    entries = list(stage.entries())
    by_layer = itertools.groupby(entries, key=lambda entry: entry[0].name if entry[1] is None else entry[1])
    groups = [list(group) for _, group in by_layer]
    mine = _share(groups, stage, replica, replicas)
    load = [0] * len(stage.held)
    return [found for group in mine for found in _rounds(group, stage, load)]


def _share(groups: list[list], stage: Stage, replica: int, replicas: int) -> list[list]:
    """The groups that a replica takes, in their order."""
    sizes = [sum(math.prod(weight.shape(stage.untied)) for weight, _, _ in group) for group in groups]
    taken: list[list[int]] = [[] for _ in range(replicas)]
    load = [0] * replicas
    for place in sorted(range(len(groups)), key=sizes.__getitem__, reverse=True):
        taker = load.index(min(load))
        load[taker] += sizes[place]
        taken[taker].append(place)
    return [groups[place] for place in sorted(taken[replica])]


def _rounds(group: list[tuple[Weight, int | None, str]], stage: Stage, load: list[int]) -> list[list[Piece]]:
    """The rounds of the weights of one layer, or of one weight outside the layers."""
    units = [(entry, rows, tensors) for entry in group for rows, tensors in _units(entry, stage)]
    here = [0] * len(load)
    writers: dict[int, int] = {}
    for place in sorted(range(len(units)), key=lambda place: _size(units[place][2]), reverse=True):
        writer = min(range(len(load)), key=lambda rank: (here[rank], load[rank]))
        here[writer] += _size(units[place][2])
        writers[place] = writer
    for rank, size in enumerate(here):
        load[rank] += size
    pieces = [
        Piece(
            weight=weight,
            layer=layer,
            model=stage.untied,
            rows=rows,
            tensors=tensors,
            writer=writers[place],
            parts=_parts(key, writers[place], stage.held),
        )
        for place, ((weight, layer, key), rows, tensors) in enumerate(units)
    ]
    if group[0][1] is not None:
        return [pieces]
    return [[block] for piece in pieces for block in _blocks(piece, stage)]


def _units(
    entry: tuple[Weight, int | None, str], stage: Stage
) -> Iterator[tuple[tuple[int, int], dict[str, tuple[int, ...]]]]:
    """The rows of a weight that one rank must write together, with the tensors that they are."""
    weight, layer, _ = entry
    shapes = {source.in_layer(layer): source.sizes(stage.untied) for source in weight.sources}
    if not weight.fusion.stacks:
        yield (0, weight.shape(stage.untied)[0]), shapes
        return
    start = 0
    for name, shape in shapes.items():
        yield (start, start + shape[0]), {name: shape}
        start += shape[0]


def _size(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, tensors.values()))


def _parts(key: str, writer: int, held: Held) -> tuple[tuple[int, BoxPart], ...]:
    """The boxes of a weight with the ranks that give them. The writer gives itself what it has."""
    givers: dict[BoxPart, int] = {}
    for rank in (writer, *range(len(held))):
        for part in held[rank]:
            if part.key == key:
                givers.setdefault(part, rank)
    parts = sorted(givers, key=lambda part: part.offset)
    assert parts and tiles(parts[0].shape, parts), f"the ranks do not have every element of {key} once"
    return tuple((givers[part], part) for part in parts)


def _blocks(piece: Piece, stage: Stage) -> Iterator[Piece]:
    """A piece in blocks of rows, each at most half as large as a layer: a matrix of the vocabulary may be larger."""
    layer = sum(math.prod(weight.shape(stage.untied)) for weight in stage.family.layer)
    start, end = piece.rows
    step = max(1, min(BLOCK_ELEMENTS, layer // 2) // math.prod(piece.shape[1:]))
    for first in range(start, end, step):
        yield replace(piece, rows=(first, min(first + step, end)))
