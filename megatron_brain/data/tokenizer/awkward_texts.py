"""Texts on which tokenizers differ, and a function that shows a difference of ids."""

from collections.abc import Sequence

AWKWARD_TEXTS = [
    "",
    " ",
    "    ",
    "\n",
    "\r\n",
    "\t",
    "a",
    " a",
    "   a",
    "a ",
    "a   ",
    "a  b   c",
    "a\nb\n\n c\n",
    "tab\there\t",
    "line\r\nend\r\n",
    "\u2581 \u2581a\u2581",
    "The quick brown fox jumps over the lazy dog, 1,234.50 times; didn't it?",
    "UPPER lower Mixed 0123456789 !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "def f(x):\n    return {'a': x ** 2}  # comment\n",
    "naïve café Åström straße ½ ﬁne ﬃ № ™",
    "\u6f22\u5b57\u304b\u306a\u3000\uff21\uff22\uff23\uff11 \ud55c\uad6d\uc5b4 \u4f60\u597d",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u043f\u0440\u0438\u0432\u0435\u0442",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "e\u0301 n\u0303 o\u0308",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "zero\u200bwidth\u200cjoin\u200der\ufeff soft\u00adhyphen no\u00a0break",
    "nul\u0000 bell\u0007 escape\u001b",
    "\ufffd\U0010ffff\ue000",
    "aaaaaaaaaaaaaaaaa =========== ((((((( ........",
    "a" * 5_000,
    " ".join(f"word{i} some more text, {i * 7};" for i in range(500)),
]
"""Texts with spaces, line breaks, digits, code, scripts, emoji and control characters, and long texts: if the rules of
two tokenizers differ, at least one of the texts shows it."""


def where_differing(ids: Sequence[int], other: Sequence[int]) -> str:
    """The text of the ids; where there are many, only of those from the first difference on."""
    if max(len(ids), len(other)) <= 20:
        return str(ids)
    shorter = min(len(ids), len(other))
    start = next((i for i in range(shorter) if ids[i] != other[i]), shorter)
    return f"{ids[start : start + 8]}... from token {start}"
