"""Converts a Hugging Face directory to a checkpoint. No model is built, and few weights are in memory at a time."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_brain.checkpointing import CheckpointInfo, publish_checkpoint, read_info, tokenizer_files
from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.folders import begin, iteration_dir
from megatron_brain.checkpointing.index import StoredBox, write_index
from megatron_brain.checkpointing.storage import write_file
from megatron_brain.config.data import TokenizerConfig
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.conversion.compare import Comparison, compare_with_hf
from megatron_brain.conversion.family import Weight
from megatron_brain.conversion.generation_config import read_generation_config
from megatron_brain.conversion.registry import read_hf_model, refuse_pad_that_ends
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.conversion.weights import check_tensors
from megatron_brain.conversion.workers import Workers
from megatron_brain.conversion.write_behind import write_behind
from megatron_brain.data.tokenizer import build_tokenizer, check_fits
from megatron_brain.models.architecture import architecture, resolve
from megatron_brain.runtime.parallel import Parallel

_MAX_FILE_BYTES = 10**9
"""Largest file that is written, unless one tensor is larger or all files that are read are smaller.

Two files are in memory at a time."""


@dataclass
class _File:
    """A file to write: weights with their layers, and the bytes that they take in memory."""

    entries: list[tuple[Weight, int | None]] = field(default_factory=list)
    nbytes: int = 0


class ToCheckpoint:
    """The conversion of a Hugging Face model to a checkpoint of iteration 0.

    Args:
        hf_model: the directory.
        bf16: whether to write bfloat16 weights instead of float32.
        tokenizer: the tokenizer that the checkpoint gets.

    Raises:
        ConfigError: the model or its tokenizer cannot be converted.
    """

    def __init__(self, hf_model: Path, *, bf16: bool, tokenizer: TokenizerConfig) -> None:
        self.source = read_hf_model(hf_model)
        self.model = resolve(ModelConfig(hf_model=str(hf_model), bf16=bf16), self.source.architecture, str(hf_model))
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.tokenizer = build_tokenizer(tokenizer.tokenizer_type, tokenizer.tokenizer_model, tokenizer.chat_template)
        check_fits(self.tokenizer, self.model.vocab_size)
        if self.source.head == "reward":
            # config.json may leave out the id that ends a text, the tokenizer knows it.
            refuse_pad_that_ends(self.source.config.get("pad_token_id"), [self.tokenizer.eos_id])
        stage = "sft" if self.source.head == "policy" else "reward"
        self.config = RunConfig(stage=stage, model=self.model, tokenizer=tokenizer)
        self._files = SafetensorsReader(self.source.directory)
        self._names = check_tensors(self._files, self.source, self.model)
        self._generation_config = read_generation_config(self.source.directory)
        self._plan = self._plan_files()
        self.nbytes = sum(file.nbytes for file in self._plan)

    def write(self, folder: Path, workers: Workers, advance: Callable[[int], None]) -> None:
        """Write the checkpoint. All processes call it, and each writes its share of the files.

        Args:
            folder: the checkpoint's, which exists and is empty.
            advance: called with the number of bytes that this process has done since the last call.
        """
        info = self._info(folder)
        partial = workers.first(lambda: begin(folder, info.iteration))
        partial = workers.gather(partial)[0]

        def write_mine() -> list[StoredBox]:
            def write(number: int, boxes: list[Box]) -> list[StoredBox]:
                stored = write_file(boxes, partial / f"weights_{number:05d}.safetensors")
                advance(self._plan[number].nbytes)
                return stored

            mine = workers.share(range(len(self._plan)), lambda number: self._plan[number].nbytes)
            written = write_behind(mine, lambda number: self._read_file(self._plan[number]), write)
            return list(itertools.chain.from_iterable(written))

        stored = workers.gather(workers.all(write_mine))

        def publish() -> None:
            write_index(partial, itertools.chain.from_iterable(stored))
            publish_checkpoint(info, self.config, tokenizer_files(self.tokenizer))

        workers.first(publish)

    def compare(self, folder: Path, parallel: Parallel, advance: Callable[[], None]) -> Comparison:
        """Compare what was written with the Hugging Face model, on this process alone."""
        return compare_with_hf(
            self.source, read_info(folder), self.model, self.tokenizer, self.dtype, parallel, advance=advance
        )

    def _plan_files(self) -> list[_File]:
        """The files to write. Their weights have the order of the network, which is about that of the files to read."""
        read = {self.source.directory / name for name in self._files.file_of.values()}
        limit = min(_MAX_FILE_BYTES, max(path.stat().st_size for path in read))
        plan = [_File()]
        for entry in self.source.family.entries(self.model, self.source.head):
            size = self._size(*entry)
            if plan[-1].entries and plan[-1].nbytes + size > limit:
                plan.append(_File())
            plan[-1].entries.append(entry)
            plan[-1].nbytes += size
        return plan

    def _size(self, weight: Weight, layer: int | None) -> int:
        """Bytes of a weight as it is read or as it is written, whichever is more."""
        read = sum(self._files.nbytes(self._names[source.in_layer(layer)]) for source in weight.sources)
        return max(read, math.prod(weight.shape(self.model)) * self.dtype.itemsize)

    def _read_file(self, file: _File) -> list[Box]:
        return [box for weight, layer in file.entries for box in self._boxes(weight, layer)]

    def _boxes(self, weight: Weight, layer: int | None) -> Iterator[Box]:
        """The boxes of a weight. Tensors that stand below each other are a box each, which saves a copy of them."""
        parts = [self._files.read(self._names[source.in_layer(layer)]) for source in weight.sources]
        if not weight.fusion.stacks:
            parts = [weight.fusion.join(parts, self.model)]
        shape, start = weight.shape(self.model), 0
        for part in parts:
            offset = (start, *(0 for _ in shape[1:]))
            yield Box(key=weight.key(layer), shape=shape, offset=offset, data=part.to(self.dtype))
            start += part.size(0)

    def _info(self, folder: Path) -> CheckpointInfo:
        return CheckpointInfo(
            path=iteration_dir(folder, 0),
            iteration=0,
            stage=self.config.stage,
            head=self.source.head,
            architecture=architecture(self.model),
            tokenizer_type=self.config.tokenizer.tokenizer_type,
            stage_state={},
            trainer_state={},
            has_optimizer=False,
            bf16=self.model.bf16,
            layout={"pipeline": 1, "tensor": 1, "data": 1},
            generation_config=self._generation_config,
        )
