"""Output folders that appear only when they are complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_brain.conversion.workers import Workers
from megatron_brain.errors import ConfigError
from megatron_brain.files import sync_folder


@contextmanager
def verified_folder(final: str | Path, workers: Workers, *, source: Path | None = None) -> Iterator[Path]:
    """A folder `<final>.unverified` to write into. It becomes `final` when the block ends without an error.

    All processes enter and leave the block. After an error the folder stays to be looked at; the next run replaces it.

    Args:
        source: the folder that is read in the block.

    Raises:
        ConfigError: `final` exists and is not an empty folder, or `source` would be removed.
    """
    # `.` has no name, its absolute path has one.
    target = Path(final).absolute()
    unverified = target.with_name(target.name + ".unverified")

    def begin() -> None:
        if target.is_symlink():
            raise ConfigError(f"--save {target} is a link: give the folder itself, {target.resolve()}")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"--save {target} exists and is not empty: give another folder, or remove it")
        if source is not None and unverified in (source.absolute(), *source.absolute().parents):
            raise ConfigError(f"{source} would be removed to make --save {target}: give another folder, or rename it")
        if unverified.is_file():
            raise ConfigError(f"{unverified}, where --save {target} is written first, is a file: remove it")
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
