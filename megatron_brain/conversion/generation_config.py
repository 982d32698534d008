"""generation_config.json of a Hugging Face directory. A converted checkpoint keeps its contents."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_brain.errors import ConfigError

FILE = "generation_config.json"


def read_generation_config(directory: str | Path) -> dict:
    """The contents of the file, or {} if there is none.

    Raises:
        ConfigError: it is not a JSON object.
    """
    path = Path(directory) / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): fetch it again, or remove it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object: fetch it again, or remove it")
    return values


def merged_generation_config(kept: dict, ids: Mapping[str, int | None]) -> dict:
    """The settings of the original model with the token ids of the tokenizer.

    Args:
        kept: the original generation_config.json. Other ids in it that end a text stay.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id`.
    """
    ends = kept.get("eos_token_id")
    others = ends if isinstance(ends, list) else [ends]
    all_ends = [ids["eos_token_id"], *(end for end in others if end not in (None, ids["eos_token_id"]))]
    return {**kept, **ids, "eos_token_id": all_ends if len(all_ends) > 1 else all_ends[0]}
