"""Files that appear whole or not at all, and outlast a power cut."""

import fnmatch
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write and sync a text file under another name, then rename it; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Sync a folder's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path, *, but: str) -> None:
    """Sync every file and folder under a folder, whoever wrote it, but files of names like `but`."""
    for folder, _, names in os.walk(path):
        for name in names:
            if fnmatch.fnmatch(name, but):
                continue
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
