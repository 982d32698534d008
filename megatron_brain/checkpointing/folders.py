"""Names and states of checkpoint folders. Nothing here needs a process group.

A folder `iter_0000100` is complete: it was written as `iter_0000100.partial` and then renamed. Folders that a crash
leaves behind have other endings, and the next save removes them. Of these only `.replaced` is ever read, and only if
the crash left no folder under the plain name. `best` is a link to the folder of the best checkpoint of a run that looks
for one.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_brain.checkpointing.checksums import file_checksum, json_checksum
from megatron_brain.checkpointing.errors import COPY, CURE, DamagedError
from megatron_brain.checkpointing.index import DATA_FILES
from megatron_brain.errors import ConfigError
from megatron_brain.files import sync_folder, write_whole

log = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best"
"""Name of the link to the best checkpoint of a run with --keep-best."""
INFO = "megatron_brain.json"
RECORDS = "records"
FORMAT = 4
_READABLE = (3, FORMAT)
"""The formats that can be read. Fields that format 3 lacks get their defaults."""

_ADDED = {"template_date": "", "files": {}}
"""The fields that format 4 added to format 3, with their defaults."""
_CHECKSUM = "checksum"
_EDITABLE = ("tokenizer/", "config.yaml")
"""Files that a user may have edited in a checkpoint."""
_PARTIAL, _REPLACED, _REMOVED = ".partial", ".replaced", ".removed"
_ITERATION = re.compile(r"iter_(\d{7,})")
_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself. Reading it needs no process group."""

    path: Path
    iteration: int
    stage: str
    head: Literal["policy", "reward"]
    architecture: dict[str, Any]
    tokenizer_type: str
    stage_state: dict[str, Any]
    """What the stage needs to resume, the same on all ranks."""
    trainer_state: dict[str, Any]
    """What the loop needs to resume: learning-rate schedule, optimizer steps, guards."""
    has_optimizer: bool
    bf16: bool
    layout: dict[str, int]
    """Sizes of pipeline, tensor and data parallelism at the save. The checkpoint loads at any layout."""
    generation_config: dict[str, Any] = field(default_factory=dict)
    """generation_config.json of the original Hugging Face model, to be exported again; {} if there is none."""
    template_date: str = ""
    """The date, ISO 8601, that the chat template wrote as the present one; "" if it writes no date."""
    files: dict[str, str] = field(default_factory=dict)
    """Checksums of the files that hold no tensors, by their names in the folder; {} in format 3."""
    format: int = field(default=FORMAT)

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    def write(self, folder: Path) -> None:
        """Write this into a folder."""
        values = dataclasses.asdict(self)
        del values["path"]
        write_whole(folder / INFO, json.dumps({**values, _CHECKSUM: json_checksum(values)}, indent=2))


def iteration_dir(root: str | Path, iteration: int) -> Path:
    """Folder of one iteration's checkpoint."""
    return Path(root) / f"iter_{iteration:07d}"


def partial_dir(root: str | Path, iteration: int) -> Path:
    """Folder in which one iteration's checkpoint is written."""
    return _other(iteration_dir(root, iteration), _PARTIAL)


def begin(root: str | Path, iteration: int) -> Path:
    """Make an empty folder to write one iteration's checkpoint into. `publish` renames it."""
    partial = partial_dir(root, iteration)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a folder holds a complete checkpoint."""
    return (Path(directory) / LATEST).is_file()


def read_info(directory: str | Path) -> CheckpointInfo:
    """Find the latest complete checkpoint in `directory`, or `directory` itself if it is an iter_ folder, or a link
    `best` to one.

    Raises:
        DamagedError: the checkpoint is damaged.
        ConfigError: the folder does not exist, or holds no checkpoint of ours.
    """
    root = _present(_followed(Path(directory)))
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise ConfigError(
            f"checkpoint folder {root.absolute()} {state}: give a --save folder, or an iter_ folder of one or its "
            f"{BEST}, which --keep-best makes"
        )
    path = root if (root / INFO).is_file() else _latest(root)
    if not (path / INFO).is_file():
        raise DamagedError(f"{path} has no {INFO}: it is damaged, or was not written by megatron_brain. {COPY}")
    try:
        values = json.loads((path / INFO).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path / INFO} is not JSON: {error}. {COPY}") from error
    if not isinstance(values, dict) or values.get("format", 1) not in _READABLE:
        found = repr(values.get("format", 1)) if isinstance(values, dict) else "unknown"
        raise ConfigError(
            f"{path} has checkpoint format {found}, this version of megatron_brain reads {FORMAT}: load it with the "
            "version that wrote it, or give another checkpoint"
        )
    written = values.pop(_CHECKSUM, None)
    if values["format"] < FORMAT:
        values = {**_ADDED, **values}
    kinds = {field.name: field.type for field in dataclasses.fields(CheckpointInfo) if field.name != "path"}
    if values.keys() != kinds.keys():
        differing = ", ".join(sorted(values.keys() ^ kinds.keys()))
        raise DamagedError(f"{path / INFO} is damaged: it differs in {differing}. {COPY}")
    for name, kind in kinds.items():
        if not _is_of(values[name], kind):
            raise DamagedError(f"{path / INFO} is damaged: its {name} is {values[name]!r}. {COPY}")
    if written is not None and written != json_checksum(values):
        raise DamagedError(
            f"{path / INFO} is damaged: it is not what was written, by its checksum. {COPY}; after an edit that was "
            f"meant, remove its {_CHECKSUM!r}"
        )
    return CheckpointInfo(path=path, **values)


def list_files(folder: Path) -> dict[str, str]:
    """Checksums of the files of a folder that hold no tensors, by their names in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.match(DATA_FILES))
    return {path.relative_to(folder).as_posix(): file_checksum(path) for path in files if path.name != INFO}


def require_files(info: CheckpointInfo) -> None:
    """Raise if a small file of a checkpoint is not what was written. For files that users edit, only warn.

    Raises:
        DamagedError: a file is missing or differs; it says the cure.
    """
    for name, written in info.files.items():
        path = info.path / name
        found = file_checksum(path) if path.is_file() else None
        if found == written:
            continue
        state = "is missing" if found is None else "is not what was saved, by its checksum"
        if found is not None and name.startswith(_EDITABLE):
            log.warning("%s %s: it was edited, or is damaged", path, state)
        else:
            raise DamagedError(f"{info.path} is damaged: {name} {state}. {CURE}")


def read_records(info: CheckpointInfo) -> list[dict[str, Any]]:
    """The stage's records of all replicas, as they were saved.

    Raises:
        DamagedError: a line is not JSON. Without --no-verify, checksums find such damage earlier.
    """
    records = []
    for file in sorted((info.path / RECORDS).glob("replica_*.jsonl")):
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                records.append(json.loads(line.decode()))
            except (ValueError, RecursionError) as error:
                raise DamagedError(f"{file}:{number} is damaged: {error}. {COPY}") from error
    return records


def write_records(folder: Path, replica: int, records: Collection[dict[str, Any]]) -> None:
    """Write a replica's records into a checkpoint's folder. Without records it makes no file."""
    if records:
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_whole(folder / RECORDS / f"replica_{replica:05d}.jsonl", text)


def publish(root: Path, iteration: int, best: int | None = None) -> None:
    """Give the complete partial folder its name, then point latest_checkpointed_iteration.txt to it.

    Wherever a crash interrupts this, the checkpoints that this file and the link `best` name can be read.

    Args:
        best: iteration of the run's best checkpoint in this folder, perhaps this one. None: the run looks for none.
    """
    final = iteration_dir(root, iteration)
    replaced = _other(final, _REPLACED)
    if final.exists():
        log.warning("%s exists from an earlier run and is replaced", final)
        final.rename(replaced)
    partial_dir(root, iteration).rename(final)
    _link_best(root, iteration, best)
    sync_folder(root)
    # This comes last: a run that goes on from an earlier checkpoint comes to this one again, and to its link.
    write_whole(root / LATEST, str(iteration))
    _remove(replaced)


def keep_latest(root: Path, iteration: int, count: int, protected: Collection[Path]) -> None:
    """Remove all but the `count` latest checkpoints up to `iteration`, except the best one and `protected` ones.

    Later iterations stay: they are there if the run was resumed from an earlier one.
    """
    numbers = sorted(number for number in _iterations(root) if number <= iteration)
    kept = {path.resolve() for path in (*protected, root / BEST)}
    for number in numbers[:-count]:
        path = iteration_dir(root, number)
        if path.resolve() not in kept:
            _remove(path)


def check_best(root: str | Path) -> None:
    """Raise ConfigError if something of another kind has the name of the link to the best checkpoint."""
    link = Path(root) / BEST
    if link.exists() and not link.is_symlink():
        raise ConfigError(
            f"keep_best: {link.absolute()} is no link, and the link to the best checkpoint needs this name: rename it, "
            "or give another --save"
        )


def _link_best(root: Path, iteration: int, best: int | None) -> None:
    """Make the link `best` name the best checkpoint. Without one, remove a link to the one that `iteration` replaced.

    If the best one is not here, as after going back to an earlier checkpoint, a link to another one stays.
    """
    link, target = root / BEST, None if best is None else iteration_dir(root, best)
    if target is not None and target.is_dir():
        new = _other(link, ".new")
        new.unlink(missing_ok=True)
        new.symlink_to(target.name)
        new.replace(link)
    elif link.is_symlink() and os.readlink(link) == iteration_dir(root, iteration).name:
        link.unlink()


def _followed(path: Path) -> Path:
    """The folder that a link `best` names; any other path as it is."""
    return path.parent / os.readlink(path) if path.name == BEST and path.is_symlink() else path


def remove_leftovers(root: Path) -> None:
    """Remove what interrupted saves left behind, and undo a replacement that was interrupted."""
    for path in sorted(root.glob("iter_*.*")):
        original = path.with_suffix("")
        if not _ITERATION.fullmatch(original.name):
            continue
        if path.suffix == _REPLACED and not original.exists():
            path.rename(original)
        elif path.suffix in (_PARTIAL, _REPLACED, _REMOVED):
            log.info("removing %s, which an interrupted save left", path)
            shutil.rmtree(path, ignore_errors=True)


def _is_of(value: object, kind: object) -> bool:
    """Whether a JSON value has a field's type, which may be a Literal. It does not look into dicts."""
    origin = get_origin(kind)
    return value in get_args(kind) if origin is Literal else type(value) is (origin or kind)


def _latest(root: Path) -> Path:
    if not has_checkpoint(root):
        cure = "was --save of the earlier run another?"
        if (root / "config.json").is_file():
            cure = "a Hugging Face model is given as --hf-model, or converted with tools/convert_hf_to_megatron.py"
        raise ConfigError(f"{root.absolute()} holds no checkpoint: it has no {LATEST}; {cure}")
    text = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not _NUMBER.fullmatch(text):
        raise DamagedError(
            f"{root / LATEST} says {text!r}, which is not an iteration number; write the number of one of its iter_ "
            "folders into it, or give that folder"
        )
    path = _present(iteration_dir(root, int(text)))
    if not path.is_dir():
        found = ", ".join(str(number) for number in _iterations(root)) or "none"
        raise DamagedError(
            f"{root / LATEST} says {text}, but {path.name} is not there; iterations found: {found}; give one of them"
        )
    return path


def _present(path: Path) -> Path:
    """The folder; if a crash interrupted its replacement, the folder that was to be replaced."""
    replaced = _other(path, _REPLACED)
    return replaced if not path.is_dir() and replaced.is_dir() else path


def _iterations(root: Path) -> list[int]:
    names = (_ITERATION.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in names if match)


def _other(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _remove(path: Path) -> None:
    """Remove a folder. Its name disappears first, so that nobody finds half of it under that name."""
    if not path.exists():
        return
    removed = _other(path.with_suffix(""), _REMOVED)
    try:
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed)
    except OSError as error:
        log.warning("%s could not be removed: %s", path, error)
