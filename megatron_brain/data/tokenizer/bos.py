"""Decides whether a tokenizer puts BOS before a text, where its files and transformers disagree.

tokenizer.json has a post-processor for it, and tokenizer_config.json may say `add_bos_token`. For classes like Llama's,
version 4 of transformers follows tokenizer_config.json, and version 5 follows tokenizer.json.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from megatron_brain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_LETTER = "a"
_ASKED = ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")
"""Beginnings of the names of the classes that follow `add_bos_token` in version 4."""


def settle_bos(hf: PreTrainedTokenizerBase, place: str, own: Tokenizer | None) -> bool:
    """Make a tokenizer put BOS before a text if its files say so, and return whether it does.

    Args:
        hf: the tokenizer; its post-processor is replaced, with a warning, where it does not do what the files say.
        place: folder or hub name of its files.
        own: the tokenizer that its tokenizer.json describes, if it has one.

    Raises:
        ConfigError: the tokenizer puts something other than BOS before a text.
    """
    there = _front(hf(_LETTER)["input_ids"], hf(_LETTER, add_special_tokens=False)["input_ids"])
    wanted, why = there, ""
    if own is not None:
        wanted = _front(own.encode(_LETTER).ids, own.encode(_LETTER, add_special_tokens=False).ids)
        why = "the post-processor in tokenizer.json"
    settings = _settings(place)
    asked = settings.get("add_bos_token")
    if isinstance(asked, bool) and str(settings.get("tokenizer_class", "")).startswith(_ASKED):
        wanted = [hf.bos_token_id] if asked and hf.bos_token_id is not None else []
        why = f"add_bos_token {json.dumps(asked)} in tokenizer_config.json"
    if wanted and wanted != [hf.bos_token_id]:
        named = "null" if hf.bos_token_id is None else f"{hf.bos_token!r} (id {hf.bos_token_id})"
        raise ConfigError(
            f"--tokenizer-model {place}: {_in_words(hf, wanted)} stands before every text, and bos_token is {named}: "
            "set bos_token in tokenizer_config.json to what the model was trained with, or mend the post-processor of "
            "tokenizer.json"
        )
    if there != wanted:
        log.warning(
            "%s: transformers puts %s before a text, %s says %s: %s",
            place,
            _in_words(hf, there),
            why,
            _in_words(hf, wanted),
            "the latter is done",
        )
        hf.add_bos_token = bool(wanted)
    return bool(wanted)


def _front(whole: list[int], plain: list[int]) -> list[int]:
    """The ids that a tokenizer puts before the ids of a text."""
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _in_words(hf: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return " ".join(f"{hf.convert_ids_to_tokens(i)!r} (id {i})" for i in ids) or "nothing"


def _settings(place: str) -> dict[str, Any]:
    """The content of tokenizer_config.json; {} where there is none."""
    from transformers.utils import cached_file

    name = "tokenizer_config.json"
    path: str | Path | None = Path(place) / name
    if not Path(place).is_dir():
        path = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
    return {} if path is None or not Path(path).is_file() else json.loads(Path(path).read_text(encoding="utf-8"))
