"""Our model of a checkpoint, run with one layer's weights in memory at a time.

A chunk of one layer is built, and that layer stands in the decoder as often as the model has layers: before each call
it is filled with the weights of the layer it stands for, read as a training run reads them. Of the embedding there are
the rows of the tokens that occur, which are numbered anew.
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
from megatron_brain.conversion.streamed_hf import BLOCK_ELEMENTS
from megatron_brain.logprobs import local_logits
from megatron_brain.models.provider import Chunk, Head, build_model
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
        self._index, self._dtype = index, dtype
        self._output = _OUTPUT if model.untie_embeddings_and_output_weights else _EMBEDDING
        small = dataclasses.replace(model, num_layers=1, vocab_size=len(tokens), bf16=False)
        (self.chunk,) = build_model(small, ParallelConfig(), parallel, head=head, seed=None)
        self.chunk.eval().requires_grad_(False)
        self._layer_boxes = []
        for box in model_boxes([self.chunk]):
            if box.key.startswith(_FIRST_LAYER):
                self._layer_boxes.append(box)
            elif box.key == _EMBEDDING:
                self._fill_rows(box.data, tokens)
            elif box.key != _OUTPUT:  # which `logits` reads
                self._fill(box)
        (layer,) = self.chunk.decoder.layers
        self.chunk.decoder.layers = nn.ModuleList([layer] * model.num_layers)
        self._layer_number = 0
        layer.register_forward_pre_hook(self._fill_layer)

    def logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First token id and logits `[T, ids]` of one block of the vocabulary after another, from hidden states
        `[T, h]` after the final norm."""
        count, width = self._index.shape(self._output)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in range(0, count, step):
            rows = hidden.new_empty(min(step, count - start), width)
            self._fill(Box(key=self._output, shape=(count, width), offset=(start, 0), data=rows))
            yield start, local_logits(hidden, rows, first_id=start, vocab_size=count)

    def _fill_layer(self, layer: nn.Module, args: tuple) -> None:
        prefix = f"decoder.layers.{self._layer_number}."
        for box in self._layer_boxes:
            self._fill(dataclasses.replace(box, key=prefix + box.key.removeprefix(_FIRST_LAYER)))
        self._layer_number += 1

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
