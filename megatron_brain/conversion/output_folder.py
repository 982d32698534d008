"""Folders that are complete or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_brain.config.errors import ConfigError


@contextmanager
def verified_folder(final: str | Path) -> Iterator[Path]:
    """A folder `<final>.unverified` to write into, which becomes `final` when the block ends without an error.

    After an error it is left to look at; the next run replaces it.

    Raises:
        ConfigError: `final` exists and is not an empty folder.
    """
    target = Path(final)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--save {target} exists and is not empty: give another folder, or remove it")
    unverified = target.with_name(target.name + ".unverified")
    if unverified.exists():
        shutil.rmtree(unverified)
    unverified.mkdir(parents=True)
    yield unverified
    if target.exists():
        target.rmdir()
    unverified.rename(target)
