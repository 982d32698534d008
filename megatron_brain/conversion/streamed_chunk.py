"""Runs our model of a checkpoint with one module's weights in memory at a time.

A chunk of one layer is built, and the decoder calls that layer as often as the model has layers. When a module of it is
called, it reads the weights of the layer that it stands for, in the way that a training run reads them. The embedding
holds only the rows of the tokens that occur, and these tokens are numbered from 0.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.state import model_boxes
from megatron_brain.checkpointing.storage import Index, fill
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.streaming import BLOCK_ELEMENTS, parameters_without_memory, read_when_called
from megatron_brain.models.logprobs import local_logits
from megatron_brain.models.provider import Chunk, build_model
from megatron_brain.runtime.parallel import Parallel

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_FIRST_LAYER = "decoder.layers.0."


class StreamedChunk:
    """The model of a checkpoint. It rounds its weights to `dtype` and computes in float32.

    Attributes:
        chunk: the model to call. It takes the position of a token in `tokens` instead of its id.

    Args:
        model: architecture of the whole model.
        index: the checkpoint's.
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
        self._boxes = _boxes_by_parameter(self.chunk)
        (layer,) = self.chunk.decoder.layers
        in_layer = set(layer.modules())
        for module in self.chunk.modules():
            own = dict(module.named_parameters(recurse=False))
            if module in in_layer:
                read_when_called(module, partial(self._read_in_layer, own))
                continue
            for name, parameter in own.items():
                if self._boxes[parameter][0].key != _OUTPUT:  # `logits` reads it.
                    setattr(module, name, self._filled(parameter, self._boxes[parameter], tokens))
        self.chunk.decoder.layers = nn.ModuleList([layer] * model.num_layers)
        self._layer_number = -1
        layer.register_forward_pre_hook(self._begin_layer, prepend=True)

    def logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first token id and the logits `[T, ids]` of each block of the vocabulary.

        Args:
            hidden: hidden states `[T, h]` after the final norm.
        """
        count, width = self._index.shape(self._output)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in range(0, count, step):
            rows = hidden.new_empty(min(step, count - start), width)
            self._fill(Box(key=self._output, shape=(count, width), offset=(start, 0), data=rows))
            yield start, local_logits(hidden, rows, first_id=start, vocab_size=count)

    def _begin_layer(self, layer: nn.Module, args: tuple) -> None:
        self._layer_number += 1

    def _read_in_layer(self, own: dict[str, nn.Parameter], name: str) -> nn.Parameter:
        """A parameter of a module of the layer, with the weights of the layer that is called."""
        prefix = f"decoder.layers.{self._layer_number}."
        renamed = [
            dataclasses.replace(box, key=prefix + box.key.removeprefix(_FIRST_LAYER)) for box in self._boxes[own[name]]
        ]
        return self._filled(own[name], renamed)

    def _filled(self, parameter: nn.Parameter, boxes: Sequence[Box], tokens: Sequence[int] = ()) -> nn.Parameter:
        """A parameter that holds its weights, given the boxes of one that has no memory."""
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
    """The boxes of each parameter of a chunk without memory. A box belongs to the parameter whose storage it views."""
    parameters = {parameter.untyped_storage()._cdata: parameter for parameter in chunk.parameters()}
    found: dict[nn.Parameter, list[Box]] = {parameter: [] for parameter in parameters.values()}
    for box in model_boxes([chunk]):
        found[parameters[box.data.untyped_storage()._cdata]].append(box)
    return found
