"""Checksums of a checkpoint's contents. With them, loading finds bits that flipped in a copy or on the disk.

They are xxHash's XXH3 of 64 bits, computed while a file is written. They find accidents, not attacks.
"""

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor


def checksum(values: Tensor) -> str:
    """Checksum of the bytes of a contiguous tensor in host memory."""
    return xxhash.xxh3_64_hexdigest(values.detach().reshape(-1).view(torch.uint8).numpy().data)


def file_checksum(path: Path) -> str:
    """Checksum of a small file."""
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def json_checksum(values: dict[str, Any]) -> str:
    """Checksum of a JSON object. The order of its keys does not matter."""
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
