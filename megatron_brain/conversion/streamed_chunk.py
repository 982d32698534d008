"""Our model of a checkpoint, run with one module's weights in memory at a time.

A chunk of one layer is built, and that layer stands in the decoder as often as the model has layers: a module of it is
given the weights of the layer it stands for when it is called, read as a training run reads them. Of the embedding
there are the rows of the tokens that occur, which are numbered anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.state import model_boxes
from megatron_brain.checkpointing.storage import Index, fill
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.streamed_hf import BLOCK_ELEMENTS, parameters_without_memory
from megatron_brain.models.logprobs import local_logits
from megatron_brain.models.provider import Chunk, build_model
from megatron_brain.runtime.parallel import Parallel

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_FIRST_LAYER = "decoder.layers.0."


class StreamedChunk:
    """The model of a checkpoint, its weights rounded to `dtype` and computed with in float32.

    Attributes:
        chunk: to be called; it knows each token by its place among `tokens`.

    Args:
        model: sizes of the whole model.
        index: of the checkpoint.
        tokens: the ids that occur.
    """

    chunk: Chunk

    def __init__(
        self,
        model: ModelConfig,
        parallel: Parallel,
        head: Head,
        index: Index,
        dtype: torch.dtype,
        tokens: Sequence[int],
    ) -> None:
        self._index, self._dtype, self._device = index, dtype, parallel.device
        self._output = _OUTPUT if model.untie_embeddings_and_output_weights else _EMBEDDING
        small = dataclasses.replace(model, num_layers=1, vocab_size=len(tokens), bf16=False)
        with parameters_without_memory():
            (self.chunk,) = build_model(small, ParallelConfig(), parallel, head=head, seed=None)
        self.chunk.eval()
        boxes = _boxes_by_parameter(self.chunk)
        (layer,) = self.chunk.decoder.layers
        in_layer = set(layer.modules())
        for module in self.chunk.modules():
            absent = {name: boxes[parameter] for name, parameter in module.named_parameters(recurse=False)}
            if module in in_layer:
                self._fill_when_called(module, absent)
                continue
            for name, parts in absent.items():
                if parts[0].key != _OUTPUT:  # which `logits` reads
                    setattr(module, name, self._filled(getattr(module, name), parts, tokens))
        self.chunk.decoder.layers = nn.ModuleList([layer] * model.num_layers)
        self._layer_number = -1
        layer.register_forward_pre_hook(self._begin_layer, prepend=True)

    def logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First token id and logits `[T, ids]` of one block of the vocabulary after another, from hidden states
        `[T, h]` after the final norm."""
        count, width = self._index.shape(self._output)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in range(0, count, step):
            rows = hidden.new_empty(min(step, count - start), width)
            self._fill(Box(key=self._output, shape=(count, width), offset=(start, 0), data=rows))
            yield start, local_logits(hidden, rows, first_id=start, vocab_size=count)

    def _begin_layer(self, layer: nn.Module, args: tuple) -> None:
        self._layer_number += 1

    def _fill_when_called(self, module: nn.Module, absent: dict[str, list[Box]]) -> None:
        """Give a module of the layer its own parameters before each call and take them after it."""
        without_memory = dict(module.named_parameters(recurse=False))

        def fill_module(module: nn.Module, args: tuple) -> None:
            prefix = f"decoder.layers.{self._layer_number}."
            for name, boxes in absent.items():
                renamed = [dataclasses.replace(box, key=prefix + box.key.removeprefix(_FIRST_LAYER)) for box in boxes]
                setattr(module, name, self._filled(without_memory[name], renamed))

        def empty_module(module: nn.Module, args: tuple, output: object) -> None:
            for name, parameter in without_memory.items():
                setattr(module, name, parameter)

        if absent:
            module.register_forward_pre_hook(fill_module)
            module.register_forward_hook(empty_module)

    def _filled(self, parameter: nn.Parameter, boxes: Sequence[Box], tokens: Sequence[int] = ()) -> nn.Parameter:
        """A parameter with memory, from boxes of it that have none."""
        values = torch.zeros(parameter.shape, device=self._device)
        for box in boxes:
            place = values.as_strided(box.data.size(), box.data.stride(), box.data.storage_offset())
            if box.key == _EMBEDDING:
                self._fill_rows(place, tokens)
            else:
                self._fill(dataclasses.replace(box, data=place))
        return nn.Parameter(values, requires_grad=False)

    def _fill_rows(self, data: Tensor, tokens: Sequence[int]) -> None:
        shape = self._index.shape(_EMBEDDING)
        self._fill(
            *(
                Box(key=_EMBEDDING, shape=shape, offset=(token, 0), data=row)
                for token, row in zip(tokens, data.split(1), strict=True)
            )
        )

    def _fill(self, *boxes: Box) -> None:
        rounded = [torch.empty(box.data.shape, dtype=self._dtype) for box in boxes]
        fill([dataclasses.replace(box, data=data) for box, data in zip(boxes, rounded, strict=True)], self._index)
        for box, data in zip(boxes, rounded, strict=True):
            box.data.copy_(data)


def _boxes_by_parameter(chunk: Chunk) -> dict[nn.Parameter, list[Box]]:
    """Boxes of each parameter of a chunk without memory: those that are views of the same storage."""
    parameters = {parameter.untyped_storage()._cdata: parameter for parameter in chunk.parameters()}
    found: dict[nn.Parameter, list[Box]] = {parameter: [] for parameter in parameters.values()}
    for box in model_boxes([chunk]):
        found[parameters[box.data.untyped_storage()._cdata]].append(box)
    return found
