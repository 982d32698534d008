"""The safetensors files of a Hugging Face directory, read one tensor at a time."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_brain.errors import ConfigError
from megatron_brain.files import explained

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsReader:
    """The tensors of a directory, by name. Nothing is read before it is asked for.

    A file is open only while one tensor is read, because what was read of an open file counts as this process's memory.
    """

    def __init__(self, directory: Path) -> None:
        """Find the files.

        Raises:
            ConfigError: there are none, the index cannot be read, or a file that it names is missing.
        """
        self.directory = directory
        self._headers: dict[str, dict[str, TensorHeader]] = {}
        # If both are there, transformers reads the single file.
        if (directory / SINGLE).is_file():
            self.file_of: dict[str, str] = dict.fromkeys(self._header(SINGLE), SINGLE)
        elif (directory / INDEX).is_file():
            self.file_of = _read_index(directory / INDEX)
        else:
            raise ConfigError(
                f"{directory} has no {SINGLE} and no {INDEX}: only safetensors weights are read; "
                "load the model with transformers and save it with save_pretrained to get them"
            )
        missing = sorted(name for name in set(self.file_of.values()) if not (directory / name).is_file())
        if missing:
            raise ConfigError(
                f"{directory / INDEX} names files that are not there: {', '.join(missing)}: fetch them too"
            )

    def lacks(self, name: str) -> bool:
        """Whether the index names a file for a tensor, and that file does not hold it."""
        return name not in self._header(self.file_of[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Raises:
            ConfigError: it is of a type that we do not read, such as a quantised one.
        """
        return self._described(name).shape

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor, without reading it."""
        described = self._described(name)
        return math.prod(described.shape) * _ITEM_BYTES[described.dtype]

    def read(self, name: str) -> Tensor:
        """A tensor. It must not be written to, because it shares the memory of the file."""
        with self._open(self.file_of[name]) as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of a tensor. The other rows are not read."""
        with self._open(self.file_of[name]) as file:
            return file.get_slice(name)[start:end]

    def _described(self, name: str) -> "TensorHeader":
        header = self._header(self.file_of[name])
        if name not in header:
            raise ConfigError(
                f"{self.directory / self.file_of[name]} has no {name}, which {INDEX} says is there: fetch both again"
            )
        if header[name].dtype not in _ITEM_BYTES:
            raise ConfigError(
                f"{self.directory / self.file_of[name]}: {name} is {header[name].dtype}; weights are read as "
                f"{', '.join(_ITEM_BYTES)}, others need what they were quantised with: give the model that is not "
                "quantised"
            )
        return header[name]

    def _header(self, name: str) -> dict[str, "TensorHeader"]:
        if name not in self._headers:
            with self._open(name) as file:
                names = file.keys()
                self._headers[name] = {key: TensorHeader.of(file.get_slice(key)) for key in names}
        return self._headers[name]

    @contextmanager
    def _open(self, name: str) -> Iterator[safe_open]:
        path = self.directory / name
        with explained(), path.open("rb") as plain:
            # safetensors says of a file without read permission that it is missing, so the file is opened here first.
            start = plain.read(len(_POINTER))
        if start == _POINTER:
            raise ConfigError(f"{path} is a pointer of git-lfs, not the weights: fetch them with `git lfs pull`")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ConfigError(f"{path} cannot be read ({error}): it may have been cut off, fetch it again") from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        file_of = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        elsewhere = [name for name in file_of.values() if Path(name).name != name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not the index of a model's files ({type(error).__name__}: {error}): fetch it again"
        ) from error
    if elsewhere:
        raise ConfigError(f"{path} names {elsewhere[0]}, which is no file of this directory: fetch it again")
    return file_of


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a file says about a tensor. `dtype` is safetensors' name of the type."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, values: object) -> "TensorHeader":
        """Made of what `safe_open.get_slice` returns."""
        return cls(values.get_dtype(), tuple(values.get_shape()))
