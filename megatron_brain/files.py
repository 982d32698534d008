"""Files that appear whole or not at all, and outlast a power cut; and whether a place can be written to."""

import fnmatch
import os
import tempfile
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


def folder_problem(flag: str, place: str) -> str | None:
    """Why a folder cannot be made, or written to, in words that name the flag; None where it can.

    Whether it can is tried: permissions do not tell it of a read-only disk. Nothing is left there.
    """
    folder = Path(place).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link to nothing"
        return f"{flag} {place}: {there} is {kind}; give the name of a folder"
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"{flag} {place}: {there} cannot be written to ({error.strerror}); give another folder"


def file_problem(flag: str, place: str) -> str | None:
    """The same of a file that is to be written."""
    if place.endswith("/") or Path(place).is_dir():
        return f"{flag} {place}: is a folder; give the name of a file in it"
    return folder_problem(flag, str(Path(place).absolute().parent))
