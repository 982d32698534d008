"""Reads the JSON values of records strictly, and removes what is null."""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

from megatron_brain.errors import RecordError, short

Json = TypeVar("Json")

BOM = b"\xef\xbb\xbf"
"""The byte order mark that some editors write before a text."""
_JSON_CURE = "write one object a line, or an array of them in a .json file"
_BLANK_TEXTS = ("", "[]", "{}", "null")
_TEXT_CURE = "write the file as UTF-8, where an emoji is one character and not two surrogates"


def decode(data: bytes, where: str) -> Any:
    """The value of a JSON text in UTF-8. Its escapes may make half of a surrogate pair (see `require_text`).

    Raises:
        RecordError: the bytes are not UTF-8 or not JSON.
    """
    try:
        # json.loads itself would accept surrogates and other encodings in bytes.
        return json.loads(data.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte {error.start}" if line == 1 else f"line {line}"
        raise RecordError(where, "not UTF-8", f"not UTF-8 text ({error.reason} at {place}): {_TEXT_CURE}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(where, "invalid JSON", f"not valid JSON: {error}; {_JSON_CURE}") from error


def require_text(value: Any, where: str) -> Any:
    """The value itself, if no text in it holds half of a surrogate pair, as an escape such as \\ud83d makes one.

    Raises:
        RecordError: a text holds one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.start + 1])
        raise RecordError(
            where, "not UTF-8", f"{half} is half of a character ({error.reason}): {_TEXT_CURE}"
        ) from error
    return value


def require_json(value: Json, what: str, where: str) -> Json:
    """The value itself, if JSON can write it. It cannot write dates, bytes and decimals of a table, NaN and infinity.

    Args:
        what: name of the value, for the error.

    Raises:
        RecordError: JSON cannot write it; names the place in the value and the cure.
    """
    if isinstance(value, dict | list):
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            require_json(member, f"{what}.{key}" if isinstance(value, dict) else f"{what}[{key}]", where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecordError(where, "no JSON", f"{what} is {value}, which JSON has no word for; give a number or a text")
    elif not isinstance(value, str | int | float | None):
        raise RecordError(
            where,
            "no JSON",
            f"{what} is a {type(value).__name__}, which JSON has no word for: a table's column has that type, and "
            "`datasets` makes dates of texts that look like one. Write the records as jsonl, or this value as a text",
        )
    return value


def without_nulls(value: Any) -> Any:
    """A JSON value in which objects have lost their null fields. Null members of lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(member) for member in value]
    return value


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty list, object or text, or the JSON text of one of them."""
    return not without_nulls(value) or (isinstance(value, str) and value.strip() in _BLANK_TEXTS)


def from_json(value: Any, kind: type, what: str, where: str, *, blank: type | None = None) -> Any:
    """The value itself, or what its JSON says if it is a text.

    Args:
        kind: type that the JSON text must have: a list or an object.
        blank: type whose empty value is returned for a text of white space or null.

    Raises:
        RecordError: the text is not JSON, or is JSON of another type.
    """
    if not isinstance(value, str):
        return value
    if blank is not None and not value.strip():
        return blank()
    named = "a list" if kind is list else "an object"
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            where, "JSON as text", f"{what} must be {named}, and is a text that is no JSON ({error}): {short(value)}"
        ) from error
    if found is None and blank is not None:
        return blank()
    if not isinstance(found, kind):
        raise RecordError(where, "JSON as text", f"{what} must be {named}, and is the JSON text of {short(found)}")
    require_text(found, where)
    return without_nulls(found)
