"""The folders of weights that trainer and servers share."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_brain.errors import ConfigError
from megatron_brain.files import explained, sync_folder
from megatron_brain.generation.vllm.jobs import run_on_all
from megatron_brain.runtime.parallel import Parallel

log = logging.getLogger(__name__)

_KEPT = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SyncFolders:
    """One folder for each hand-over of weights, `ROOT/RUN/00012`. The last two stay.

    A folder is never written twice, because servers may keep what they read. It is written as `00012.partial` and
    renamed when it is complete. All ranks make this object, and call its methods, together.

    Args:
        root: --engine-sync-dir.
        run_id: a name that no other run has.

    Raises:
        AgreedError: on all ranks: rank 0 cannot write there.
    """

    def __init__(self, root: str, run_id: str, parallel: Parallel) -> None:
        self._parallel = parallel
        # Servers have other working directories.
        self.folder = Path(root).absolute() / run_id
        self._number = 0
        self._made: list[Path] = []
        self._on_first(self._begin)

    def write(self, write: Callable[[Path], None]) -> Path:
        """Make the next folder.

        Args:
            write: fills a folder; all ranks call it together.

        Raises:
            AgreedError: on all ranks: the disk is full, or refuses the write. The partial folder is removed.
        """
        self._number += 1
        folder = self.folder / f"{self._number:05d}"
        unfinished = folder.with_name(folder.name + ".partial")
        self._on_first(unfinished.mkdir)
        try:
            run_on_all(lambda: self._explained(unfinished, lambda: write(unfinished)), self._parallel)
        except BaseException:
            if self._parallel.is_writer:
                shutil.rmtree(unfinished, ignore_errors=True)  # What made the write fail is told, not this.
            raise
        self._on_first(lambda: _publish(unfinished, folder))
        self._made.append(folder)
        return folder

    def remove_old(self) -> None:
        """Remove all but the last two folders."""
        old, self._made = self._made[:-_KEPT], self._made[-_KEPT:]
        for folder in old:
            self._on_first(partial(_remove, folder))

    def _begin(self) -> None:
        root = self.folder.parent
        others = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        if others:
            log.warning(
                "--engine-sync-dir %s has the weights of %d other runs (%s): remove those of runs that have ended",
                root,
                len(others),
                ", ".join(sorted(others)[:4]) + (", ..." if len(others) > 4 else ""),
            )
        self.folder.mkdir(parents=True)

    def _on_first(self, action: Callable[[], None]) -> None:
        run_on_all(lambda: self._explained(self.folder, action) if self._parallel.is_writer else None, self._parallel)

    def _explained(self, place: Path, action: Callable[[], None]) -> None:
        """Do what writes, and tell an error of the file system by place and cure."""
        try:
            with explained():
                action()
        except OSError as error:
            cure = "make room on that disk" if error.errno in _FULL else "look after that disk"
            raise ConfigError(
                f"{error.filename or place}: {error.strerror or error}: the weights for the servers cannot be written: "
                f"{cure}, or name another one with --engine-sync-dir"
            ) from error


def _publish(unfinished: Path, folder: Path) -> None:
    unfinished.rename(folder)
    sync_folder(folder.parent)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)
    for mark in folder.parent.glob(f"{folder.name}-*.restored"):
        mark.unlink()
