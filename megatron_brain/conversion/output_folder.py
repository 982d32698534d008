"""Folders that are complete or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_brain.config.errors import ConfigError
from megatron_brain.conversion.workers import Workers
from megatron_brain.files import sync_folder


@contextmanager
def verified_folder(final: str | Path, workers: Workers) -> Iterator[Path]:
    """A folder `<final>.unverified` to write into, which becomes `final` when the block ends without an error.

    All processes enter and leave it. After an error it is left to look at; the next run replaces it.

    Raises:
        ConfigError: `final` exists and is not an empty folder.
    """
    target = Path(final)
    unverified = target.with_name(target.name + ".unverified")

    def begin() -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"--save {target} exists and is not empty: give another folder, or remove it")
        if unverified.exists():
            shutil.rmtree(unverified)
        unverified.mkdir(parents=True)

    def publish() -> None:
        if target.exists():
            target.rmdir()
        unverified.rename(target)
        sync_folder(target.parent)

    workers.first(begin)
    yield unverified
    workers.first(publish)
