"""`PREFIX.json`, which describes prepared data and shows that they are complete."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_brain.data.contents import Contents
from megatron_brain.data.lengths import ReadReport
from megatron_brain.data.prepared.documents import FILES, Format
from megatron_brain.errors import ConfigError
from megatron_brain.files import write_whole

FORMAT_VERSION = 2
TOOL = "tools/preprocess_data.py"

_ENDINGS = {".json", *(ending for endings in FILES.values() for ending in endings)}
_BEGINNING = re.compile(rb'\s*\{\s*"format_version"')


@dataclass(frozen=True, kw_only=True)
class PreparedInfo:
    """Contents of `PREFIX.json`."""

    format_version: int
    stage: str
    """The stage that the data are for: sft, reward or brain."""
    format: Format
    tokenizer: dict[str, Any]
    """`tokenizer_type`, `vocab_size` and `fingerprint`."""
    settings: dict[str, Any]
    """`RecordReader.settings`: the limits and rules that the items were made with."""
    source: dict[str, Any]
    """`input`, `split` and the `files` with their sizes and modification times."""
    counts: dict[str, int]
    """`ReadReport` of the whole source."""
    statistics: dict[str, Any]
    """Lengths and numbers of tokens."""
    contents: dict[str, Any]
    """`Contents` of the items."""
    files: dict[str, int]
    """Sizes of the data files in bytes, by the endings of their names."""

    def write(self, prefix: str) -> None:
        """Write `PREFIX.json`, which makes the result complete."""
        write_whole(Path(f"{prefix}.json"), json.dumps(asdict(self), indent=1) + "\n")

    def require_whole(self) -> None:
        """Check that everything is there that later code uses without checking.

        Raises:
            TypeError, KeyError, AttributeError: something is missing or of another type.
        """
        ReadReport(**self.counts)
        Contents.from_dict(self.contents)
        _ = self.tokenizer["fingerprint"], self.tokenizer["vocab_size"], self.settings["seq_length"]
        _ = self.source["input"], FILES[self.format]
        self.files.items()


def prepared_prefix(source: str) -> str | None:
    """The prefix of the prepared data that `source` names, as PREFIX or as one of its files; None where it names none.

    Raises:
        ConfigError: the preparation has not finished, or its PREFIX.json is missing.
    """
    path = Path(source)
    for prefix in (source, source.removesuffix(path.suffix) if path.suffix in _ENDINGS else source):
        if _is_info(Path(f"{prefix}.json")):
            return prefix
    if path.exists():
        return None
    if Path(f"{source}.parts").is_dir():
        raise ConfigError(f"{source}: its preparation has not finished; run the same {TOOL} command again")
    if there := [source + ending for ending in sorted(_ENDINGS - {".json"}) if Path(source + ending).is_file()]:
        raise ConfigError(
            f"{source}: {' and '.join(there)} without a {source}.json that {TOOL} wrote: copy that too, or name a file "
            "of records with its ending"
        )
    return None


def refuse_prepared(source: str) -> None:
    """Raise ConfigError where raw records are needed and `source` names prepared data."""
    if (prefix := prepared_prefix(source)) is not None:
        made_of = read_info(prefix).source["input"]
        raise ConfigError(f"{source}: is prepared data, not records; it was made of {made_of}; give that")


def _is_info(path: Path) -> bool:
    """Whether a file is a PREFIX.json, and not a file of records with such a name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _BEGINNING.match(file.read(64)) is not None


def read_info(prefix: str) -> PreparedInfo:
    """The description of prepared data, after a check that all files have their sizes.

    Raises:
        ConfigError: the files are of another version, or damaged.
    """
    path = Path(f"{prefix}.json")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _not_written(path, error) from error
    try:
        if values["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{path}: prepared in format version {values['format_version']}, this is version {FORMAT_VERSION}; "
                f"prepare it again with {TOOL}"
            )
        info = PreparedInfo(**values)
        info.require_whole()
    except (TypeError, KeyError, AttributeError) as error:
        raise _not_written(path, error) from error
    for ending, size in info.files.items():
        file = Path(prefix + ending)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ConfigError(f"{file} {state}, {path.name} says {size:,} bytes; copy it again or prepare it again")
        file.open("rb").close()  # If reading is not permitted, this error is clearer than that of memory-mapping.
    return info


def _not_written(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: not written by {TOOL}, or damaged ({type(error).__name__}: {error}); copy it again, or prepare the "
        "records again under another name"
    )
