"""Reads the tokenizer that a folder's tokenizer.json describes, whatever class transformers chooses for it.

Since version 5, AutoTokenizer builds some tokenizers from their class or from the model type of config.json, and takes
only the vocabulary from the file. Where this gives other ids than the file, the model was not trained with them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from megatron_brain.data.tokenizer.awkward_texts import AWKWARD_TEXTS, where_differing
from megatron_brain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FILE = "tokenizer.json"
_VOCABULARIES = (_FILE, "*.model", "*.model.v*", "vocab.*", "*.tiktoken", "tekken.json", "*.spm")
_SPECIAL_TOKENS_TRIED = 64
_LONGEST = 300
"""Limit of a compared text, in characters. It is small because every start of a run waits for the comparison."""
_LETTER = "a"
_DIGITS = ("0", "7 1650", "2026-11-30", "12345678901234567890", "3.14159e-05", "a1b22c333")


def read_tokenizer(place: str) -> tuple[PreTrainedTokenizerBase, Tokenizer | None]:
    """The tokenizer of a folder or a hub name, and the one that its tokenizer.json describes, if it has that file.

    Raises:
        ConfigError: the tokenizer cannot be read, the folder holds none, or no class gives the ids of tokenizer.json.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        chosen = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # The library's readers raise many unrelated types for a bad folder.
        raise _unreadable(place, error) from error
    own = _read_own(place)
    if not set(chosen.get_vocab().values()) - set(chosen.added_tokens_decoder):
        raise _no_tokenizer(place)
    if own is None:
        if isinstance(problem := _ids(chosen, _LETTER), str):
            raise _unusable(place, f"its tokenizer cannot encode {_LETTER!r} ({problem})")
        return chosen, own
    if (unknown := _not_encoded(own)) is not None:
        raise _unusable(place, f"its {_FILE} {unknown}")
    if (difference := _difference(chosen, own)) is None:
        _require_known(chosen, own, place)
        return chosen, own
    plain = PreTrainedTokenizerFast.from_pretrained(place)
    what = f"{place}: AutoTokenizer ({type(chosen).__name__}) {difference}"
    if (still := _difference(plain, own)) is not None:
        raise ConfigError(f"{what}; without its class, transformers {still}; repair tokenizer_config.json")
    log.warning(
        "%s. The file's ids are taken: the class in tokenizer_config.json, or the model_type in config.json, is of "
        "another tokenizer",
        what,
    )
    _require_known(plain, own, place)
    return plain, own


def _require_known(hf: PreTrainedTokenizerBase, own: Tokenizer, place: str) -> None:
    """Raise ConfigError where EOS or BOS is not a token of the file: transformers would add it as a new token."""
    for name in ("eos_token", "bos_token"):
        token = getattr(hf, name)
        if token is not None and own.token_to_id(str(token)) is None:
            raise ConfigError(
                f"--tokenizer-model {place}: {name} {token!r} is not in its {_FILE}: transformers makes the new id "
                f"{hf.convert_tokens_to_ids(str(token))} of it, which no model has learned; set {name} in "
                "tokenizer_config.json to a token that is there"
            )


def _has_no_files(place: str) -> bool:
    """Whether a folder has no file that could hold a vocabulary."""
    folder = Path(place)
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)


def _no_tokenizer(place: str) -> ConfigError:
    return ConfigError(
        f"--tokenizer-model {place}: there is no tokenizer in it, or one without a vocabulary: copy the files of the "
        "model's tokenizer there (tokenizer.json, tokenizer_config.json), or give --tokenizer-model another folder"
    )


def _unreadable(place: str, error: Exception) -> ConfigError:
    if _has_no_files(place):
        return _no_tokenizer(place)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError(
        f"--tokenizer-model {place}: AutoTokenizer cannot read it ({reason}); "
        "give a directory with tokenizer.json and tokenizer_config.json, or a hub name that can be reached"
    )


def _unusable(place: str, problem: str) -> ConfigError:
    return ConfigError(
        f"--tokenizer-model {place}: {problem}: copy the files of the model's tokenizer there again, or give it an "
        "unknown token or byte fallback"
    )


def _read_own(place: str) -> Tokenizer | None:
    """The tokenizer that the tokenizer.json of a folder or hub name describes, without padding or truncation; None
    where there is no such file."""
    from transformers.utils import cached_file

    path: str | Path | None = Path(place) / _FILE
    try:
        if not Path(place).is_dir():
            path = cached_file(place, _FILE, _raise_exceptions_for_missing_entries=False)
        if path is None or not Path(path).is_file():
            return None
        own = Tokenizer.from_file(str(path))
    except Exception as error:  # This reader also raises many unrelated types.
        raise _unreadable(place, error) from error
    own.no_padding()
    own.no_truncation()
    return own


def _difference(hf: PreTrainedTokenizerBase, own: Tokenizer) -> str | None:
    """A sentence about the first text that has other ids than by the file; None where there is none."""
    texts = list(_probes(own))
    for literal in (False, True):
        own.encode_special_tokens = literal
        if _ids(hf, texts, literal=literal) == [e.ids for e in own.encode_batch(texts, add_special_tokens=False)]:
            continue
        for text in texts:
            theirs, ours = _ids(hf, text, literal=literal), own.encode(text, add_special_tokens=False).ids
            if isinstance(theirs, str):
                return f"cannot encode {text[:60]!r} ({theirs}), and {_FILE} can"
            if theirs != ours:
                return (
                    f"turns {text[:60]!r} into {where_differing(theirs, ours)}, and {_FILE} into "
                    f"{where_differing(ours, theirs)}"
                )
    return None


def _ids(hf: PreTrainedTokenizerBase, text: str | list[str], *, literal: bool = True) -> list[Any] | str:
    """The ids of one or several texts, or the error as text: a class may fail with a vocabulary made for another."""
    try:
        ids: list[Any] = hf(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)["input_ids"]
        return ids
    except Exception as error:  # The class may raise anything.
        return f"{type(error).__name__}: {error}"


def _not_encoded(own: Tokenizer) -> str | None:
    """A sentence about the first text that the file's tokenizer cannot encode; None where there is none."""
    for text in _probes(own):
        try:
            own.encode(text, add_special_tokens=False)
        except Exception as error:  # The library has no error type of its own.
            return f"cannot encode {text[:60]!r} ({error})"
    return None


def _probes(own: Tokenizer) -> Iterator[str]:
    yield from _DIGITS
    yield from (text[:_LONGEST] for text in AWKWARD_TEXTS)
    added = [token.content for token in own.get_added_tokens_decoder().values()]
    for token in added[:_SPECIAL_TOKENS_TRIED]:
        yield f"a{token} b{token}\n{token}{token}c"
