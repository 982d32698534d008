"""Word marks: what some tokenizers put before every text, and how a text is read that goes on after another one.

A tokenizer of Llama 2's kind reads "at nine" as "\u2581at \u2581nine", as if a space stood before it. Behind a prompt
that is not what the joined text says: there "when?\\n" + "at nine" has no space. So such a tokenizer gets a second one
beside it that differs in the mark alone.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

SPACE = "\u2581"
"""How SentencePiece writes a space."""


def without_word_mark(backend: Tokenizer) -> Tokenizer | None:
    """The same tokenizer without the mark, or None where it puts none.

    Args:
        backend: of a fast tokenizer. Marks are put by a normalizer that prepends a text, by the Metaspace
            pre-tokenizer, and by a byte-level one that adds a space.
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
    """A normalizer or pre-tokenizer, as its JSON describes it, that puts no mark; None where nothing of it is left."""
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
    """Whether a replacement puts a space before the text and replaces nothing, as `sentencepiece_fast` makes one."""
    pattern = replace["pattern"].get("Regex", "")
    return pattern.startswith(("\\A(?", "^(?")) and replace["content"] in (" ", SPACE)


def begins_word(joined: str) -> bool:
    """Whether a normalised text that starts with a letter goes on with a new word."""
    return joined.removeprefix(SPACE)[1:2] in (" ", SPACE)
