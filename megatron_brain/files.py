"""Writes files that appear whole or not at all and outlast a power cut, and tells whether a place can be written to."""

import errno
import fnmatch
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_brain.errors import ConfigError

_CURES = {
    errno.EACCES: "give this user the right to it, or name another place",
    errno.EPERM: "give this user the right to it, or name another place",
    errno.EROFS: "name a place on a disk that can be written to",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead back to themselves; give another place",
    errno.EISDIR: "a file should be there; remove the folder, or name another place",
    errno.ENOTDIR: "a folder should be there; remove the file, or name another place",
}
"""What the user can do where the file system refuses, by the number of its error."""


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
    """Sync every file and folder under a folder, whoever wrote it, except files whose names match `but`."""
    for folder, _, names in os.walk(path):
        for name in names:
            if fnmatch.fnmatch(name, but):
                continue
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def folder_problem(flag: str, place: str) -> str | None:
    """Why a folder cannot be made, or written to, in words that name the flag; None where it can.

    A temporary file is made and removed, because permissions do not show a read-only disk.
    """
    reason = _unexpanded(place) or _refusal(Path(place).absolute())
    return None if reason is None else f"{flag} {place}: {reason}; give another folder"


def file_problem(flag: str, place: str) -> str | None:
    """Why a file cannot be written, in words that name the flag; None where it can. The file may exist already."""
    path = Path(place).absolute()
    reason = _unexpanded(place) or _refusal(path.parent) or _unknown_name(path)
    if reason is None:
        if place.endswith("/") or path.is_dir():
            return f"{flag} {place}: is a folder; give the name of a file in it"
        if path.is_symlink():
            reason = "is a link, which a file would replace"
        elif path.exists() and not path.is_file():
            reason = "is a device or a pipe, which a file would replace"
    return None if reason is None else f"{flag} {place}: {reason}; give another file"


def _unexpanded(place: str) -> str | None:
    """Why a name is not the one that was meant: it begins with `~` or a variable that no shell has replaced.

    No shell replaces the beginning of `--save=~/runs`, or of `save: $HOME/runs` in a YAML file.
    """
    start = Path(place).parts[0] if Path(place).parts else ""
    if not start.startswith(("~", "$")) or os.path.lexists(start):
        return None
    return f"begins with {start}, which no shell has replaced here"


def _refusal(folder: Path) -> str | None:
    """Why nothing can be written into a folder that exists or is to be made; None where it can."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is {'a file' if there.exists() else 'a link to nothing'}, and should be a folder"
    try:
        with tempfile.TemporaryFile(dir=there):
            return _unknown_name(folder)
    except OSError as error:
        return f"{there} cannot be written to ({error.strerror})"


def _unknown_name(path: Path) -> str | None:
    """Why no file or folder can have this name, such as one that is too long; None where it can."""
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    return None


@contextmanager
def explained() -> Iterator[None]:
    """Turn an error of the file system that the user can mend into a ConfigError.

    Raises:
        ConfigError: no permission, a name that is too long, a file where a folder should be and the like; names the
            place and the cure. Other errors, such as those of a full or broken disk, stay as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CURES or error.filename is None:
            raise
        raise ConfigError(f"{os.fsdecode(error.filename)}: {error.strerror}: {_CURES[error.errno]}") from error
