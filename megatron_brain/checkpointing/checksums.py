"""Checksums of what a checkpoint holds: a bit that flipped on the way or on the disk is found when it is loaded.

They are xxHash's XXH3 of 64 bits, made while a file is written. That is no cryptography: it finds accidents.
"""

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor


def checksum(values: Tensor) -> str:
    """Checksum of a contiguous tensor's bytes, on the host."""
    return xxhash.xxh3_64_hexdigest(values.detach().reshape(-1).view(torch.uint8).numpy().data)


def file_checksum(path: Path) -> str:
    """Checksum of a small file."""
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def json_checksum(values: dict[str, Any]) -> str:
    """Checksum of a JSON object, whatever the order of its keys."""
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
