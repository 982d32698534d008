"""Removes the word mark that some tokenizers put before every text, for texts that continue another text.

A tokenizer like Llama 2's reads "at nine" as "\u2581at \u2581nine", as if a space stood before it. After a prompt this
is wrong: the joined text of "when?\\n" and "at nine" has no such space. So a second tokenizer is made for these texts
that differs only in the mark.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

SPACE = "\u2581"
"""The character that SentencePiece writes for a space."""


def without_word_mark(backend: Tokenizer) -> Tokenizer | None:
    """The same tokenizer without the mark; None where it puts no mark.

    Args:
        backend: the backend of a fast tokenizer. A normalizer that prepends a text, the Metaspace pre-tokenizer and a
            byte-level pre-tokenizer that adds a space put marks.
    """
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    changed = {}
    for name, part in parts.items():
        described = None if part is None else json.loads(part.__getstate__())
        without = _unmarked(described)
        if without != described:
            changed[name] = without
    if not changed:
        return None
    copy = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), **changed}))
    copy.no_padding()
    copy.no_truncation()
    return copy


def _unmarked(part: Any) -> Any:
    """The JSON of a normalizer or pre-tokenizer without the part that puts marks; None where nothing is left."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Sequence":
        members = "normalizers" if "normalizers" in part else "pretokenizers"
        left = [member for member in map(_unmarked, part[members]) if member is not None]
        return {**part, members: left} if left else None
    if kind == "Prepend" or (kind == "Replace" and _prepends(part)):
        return None
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel" and part.get("add_prefix_space"):
        return {**part, "add_prefix_space": False}
    return part


def _prepends(replace: dict[str, Any]) -> bool:
    """Whether a Replace normalizer only puts a space before the text, as the one of `sentencepiece_fast` does."""
    pattern = replace["pattern"].get("Regex", "")
    return pattern.startswith(("\\A(?", "^(?")) and replace["content"] in (" ", SPACE)


def begins_word(joined: str) -> bool:
    """Whether a new word follows the letter that a normalised text starts with."""
    return joined.removeprefix(SPACE)[1:2] in (" ", SPACE)
