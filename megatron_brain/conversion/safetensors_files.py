"""The safetensors files of a Hugging Face directory: read one tensor at a time, written in shards."""

import contextlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_brain.config.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5 * 10**9


class SafetensorsReader:
    """Tensors of a directory by name. A context manager; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Find the files.

        Raises:
            ConfigError: there are none, or one that the index names is missing.
        """
        self.directory = directory
        self._open = contextlib.ExitStack()
        self._files: dict[str, safe_open] = {}
        if (directory / INDEX).is_file():
            self.file_of: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
        elif (directory / SINGLE).is_file():
            self.file_of = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            raise ConfigError(
                f"{directory} has no {SINGLE} and no {INDEX}: only safetensors weights are read; "
                "load the model with transformers and save it with save_pretrained to get them"
            )
        missing = sorted(name for name in set(self.file_of.values()) if not (directory / name).is_file())
        if missing:
            raise ConfigError(f"{directory / INDEX} names files that are not there: {', '.join(missing)}")

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file(self.file_of[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        return self._file(self.file_of[name]).get_tensor(name)

    def _file(self, name: str) -> safe_open:
        if name not in self._files:
            path = self.directory / name
            try:
                self._files[name] = self._open.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ConfigError(
                    f"{path} cannot be read ({error}): it may have been cut off, fetch it again"
                ) from error
        return self._files[name]


class SafetensorsWriter:
    """Writes tensors as transformers does: one file, or numbered shards and an index."""

    def __init__(self, directory: Path, *, max_shard_bytes: int = _MAX_SHARD_BYTES) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; a full shard goes to disk. A single tensor over the limit has a shard of its own."""
        if self._shard and self._shard_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left and, where there are several shards, the index."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._partial(0).rename(self.directory / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._written):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))

    def _flush(self) -> None:
        save_file(self._shard, self._partial(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.partial"
