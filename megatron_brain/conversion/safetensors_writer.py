"""A safetensors file that is written piece by piece, so that its tensors need not be in memory together."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsWriter:
    """Writes a file whose tensors are known by name and shape before their values are.

    Args:
        path: the file, which is opened at once and replaced if it is there.
        shapes: the tensors' shapes by their names, in the order in which their values will come.
        dtype: of all of them.

    Raises:
        OSError: the file could not be opened or written. `write` and `close` raise the same.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._dtype = dtype
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # The values begin at a multiple of 8 bytes.
        self._file = path.open("wb", buffering=0)
        self._append(memoryview(len(encoded).to_bytes(8, "little") + encoded))

    def write(self, values: Tensor) -> None:
        """Append values: those of a whole tensor, or of its next rows. One copy on the host is made at most."""
        plain = values.to(device="cpu", dtype=self._dtype).contiguous()
        self._append(memoryview(plain.view(-1).view(torch.uint8).numpy()))

    def close(self) -> None:
        """Close the file. It is not synced, but other machines that open it from now on see all of it."""
        self._file.close()

    def _append(self, data: memoryview) -> None:
        while data:  # One call of the system writes 2 GB at most.
            data = data[self._file.write(data) :]
