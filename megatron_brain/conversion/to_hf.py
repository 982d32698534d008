"""Converts a checkpoint to a Hugging Face directory. A shard is read while the one before it is written."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor

from megatron_brain.checkpointing import read_info, require_files
from megatron_brain.checkpointing.boxes import BoxPart
from megatron_brain.checkpointing.index import read_index
from megatron_brain.checkpointing.state import NOT_WEIGHTS
from megatron_brain.checkpointing.storage import read_part, write_safetensors
from megatron_brain.checkpointing.verification import require_sound
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion.compare import Comparison, compare_with_hf
from megatron_brain.conversion.family import Weight
from megatron_brain.conversion.generation_config import FILE as GENERATION_CONFIG
from megatron_brain.conversion.generation_config import merged_generation_config
from megatron_brain.conversion.hf_files import as_json, hf_config, index_json, special_ids
from megatron_brain.conversion.registry import family_for_export, read_hf_model
from megatron_brain.conversion.safetensors_files import INDEX
from megatron_brain.conversion.workers import Workers
from megatron_brain.conversion.write_behind import write_behind
from megatron_brain.data.tokenizer import build_tokenizer, check_fits
from megatron_brain.errors import ConfigError
from megatron_brain.files import sync_tree, write_whole
from megatron_brain.models.architecture import resolve
from megatron_brain.runtime.parallel import Parallel


class ToHF:
    """The conversion of a checkpoint, of any layout, to a Hugging Face directory.

    Args:
        load: a checkpoint folder, or one iter_ folder of it.
        dtype: type of the written weights. None means the checkpoint's type.
        max_shard_size: largest file of weights, unless one tensor is larger. It is spelled as in transformers ("5GB").
        hf_model_type: family to write. None means the one the model came from, else the first that can express it.
        chat_template: file of a template that replaces the tokenizer's. None means the tokenizer's own.
        verify: whether to compare what is read with its checksums.
        untie: whether to write the output layer of a tied model too, as one that is not tied has it.

    Raises:
        ConfigError: there is no checkpoint, transformers cannot express it, a size cannot be read, or a reward model,
            which has no output layer, is to be untied.
    """

    def __init__(
        self,
        load: Path,
        *,
        dtype: torch.dtype | None,
        max_shard_size: str,
        hf_model_type: str | None,
        chat_template: str | None = None,
        verify: bool = True,
        untie: bool = False,
    ) -> None:
        self.info = read_info(load)
        self._verify = verify
        if verify:
            require_files(self.info)
        model = resolve(ModelConfig(bf16=self.info.bf16), self.info.architecture, str(self.info.path))
        if hf_model_type is not None:
            model = dataclasses.replace(model, hf_model_type=hf_model_type)
        self.model = model
        self._written = self._untied() if untie else model
        self.dtype = dtype or (torch.bfloat16 if self.info.bf16 else torch.float32)
        self.family = family_for_export(self._written)
        self.tokenizer = build_tokenizer(self.info.tokenizer_type, self.info.tokenizer_dir, chat_template)
        check_fits(self.tokenizer, model.vocab_size)
        self.config = hf_config(self.family, self._written, self.info.head, self.dtype, self.tokenizer)
        self._index = read_index(self.info.path)
        self._check_weights()
        self._sizes = {name: self._meta(shape) for name, shape in self.family.tensors(self._written, self.info.head)}
        self._split = _split(self._sizes, max_shard_size)
        self.nbytes = self._split.metadata["total_size"]

    def write(self, folder: Path, workers: Workers, advance: Callable[[int], None]) -> None:
        """Write the directory. All processes call it, and each writes its share of the files.

        config.json is written last, because without it no program takes the directory for a model.

        Args:
            folder: one that exists and is empty.
            advance: called with the number of bytes that this process has done since the last call.
        """

        def write_mine() -> None:
            shards = self._split.filename_to_tensors

            def write(name: str, tensors: dict[str, Tensor]) -> None:
                write_safetensors(tensors, folder / name, metadata={"format": "pt"})
                advance(self._shard_bytes(name))

            mine = workers.share(list(shards), self._shard_bytes)
            write_behind(mine, lambda name: self._read_shard(set(shards[name])), write)

        if self._verify:
            boxes = [box for key in self._weights() for box in self._index.boxes[key]]
            mine = workers.share(boxes, lambda box: box.part.nbytes)
            workers.all(lambda: require_sound(mine, self.info.path))
        # The tokenizer comes first, because transformers may be unable to express it.
        workers.first(lambda: self._write_tokenizer(folder))
        workers.all(write_mine)
        workers.first(lambda: self._write_small_files(folder))

    def compare(self, folder: Path, parallel: Parallel, advance: Callable[[], None]) -> Comparison:
        """Compare what was written with the checkpoint, on this process alone."""
        source = read_hf_model(folder)
        return compare_with_hf(source, self.info, self.model, self.tokenizer, self.dtype, parallel, advance=advance)

    def _untied(self) -> ModelConfig:
        if self.info.head == "reward":
            raise ConfigError(
                f"--untie: {self.info.path} is a reward model, which has no output layer to untie; drop the flag"
            )
        return dataclasses.replace(self.model, untie_embeddings_and_output_weights=True)

    def _check_weights(self) -> None:
        """Check that the checkpoint has the weights of its architecture and no others."""
        entries = self.family.entries(self.model, self.info.head)
        expected = {weight.key(layer): weight.shape(self.model) for weight, layer in entries}
        found = {key: self._index.shape(key) for key in self._weights()}
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                raise ConfigError(
                    f"{self.info.path}: the checkpoint's {key} is {found.get(key, 'not there')}, "
                    f"by its architecture it is {expected.get(key, 'not there')}"
                )

    def _weights(self) -> list[str]:
        return [key for key in self._index.boxes if not key.startswith(NOT_WEIGHTS)]

    def _meta(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def _shard_bytes(self, name: str) -> int:
        return sum(self._sizes[tensor].nbytes for tensor in self._split.filename_to_tensors[name])

    def _read_shard(self, names: set[str]) -> dict[str, Tensor]:
        """Tensors of a shard by name, rounded to the type that is written."""
        tensors = {}
        for weight, layer in self.family.entries(self._written, self.info.head):
            wanted = [source.in_layer(layer) for source in weight.sources]
            if names.isdisjoint(wanted):
                continue
            shape = weight.shape(self.model)
            key = self.family.stored_key(weight, layer, self.model)
            whole = BoxPart(key=key, dtype=self.dtype, shape=shape, offset=(0,) * len(shape), size=shape)
            if weight.fusion.stacks:
                tensors |= self._read_stacked(whole, weight, layer, names)
            else:
                # A weight whose tensors are in two shards is read for each of them.
                split = weight.fusion.split(read_part(whole, self._index), self.model)
                found = zip(wanted, split, strict=True)
                tensors |= {name: tensor.contiguous() for name, tensor in found if name in names}
        return tensors

    def _read_stacked(self, whole: BoxPart, weight: Weight, layer: int | None, names: set[str]) -> dict[str, Tensor]:
        """Those tensors of `names` that stand below each other in a weight."""
        tensors, start = {}, 0
        for source in weight.sources:
            size, name = source.sizes(self.model), source.in_layer(layer)
            if name in names:
                part = dataclasses.replace(whole, offset=(start, *whole.offset[1:]), size=size)
                tensors[name] = read_part(part, self._index)
            start += size[0]
        return tensors

    def _write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer in a scratch folder and move it. transformers chooses its class by the config.json beside
        it, and `folder` must not have a config.json yet."""
        with tempfile.TemporaryDirectory(dir=folder) as name:
            scratch = Path(name)
            write_whole(scratch / "config.json", as_json(self.config))
            self.tokenizer.export(scratch, self.info.head)
            (scratch / "config.json").unlink()
            for path in scratch.iterdir():
                path.rename(folder / path.name)

    def _write_small_files(self, folder: Path) -> None:
        if self._split.is_sharded:
            write_whole(folder / INDEX, index_json(self._split.metadata, self._split.tensor_to_filename))
        if self.info.head == "policy":
            generation = merged_generation_config(self.info.generation_config, special_ids(self.tokenizer))
            write_whole(folder / GENERATION_CONFIG, as_json(generation))
        sync_tree(folder, but="*.safetensors")  # Those are synced already.
        write_whole(folder / "config.json", as_json(self.config))


def _split(sizes: dict[str, Tensor], max_shard_size: str) -> StateDictSplit:
    """Which tensors go into which file. The function that decides is the one that transformers uses."""
    try:
        split = split_torch_state_dict_into_shards(
            sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        size = float(max_shard_size.strip()[:-2])
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size}: {error}") from error
    if size <= 0:
        raise ConfigError(f"--max-shard-size {max_shard_size}: must be positive")
    return split
