"""Verdicts of a language model: what a reply says, and the file that keeps them."""

import json
import logging
import re
from pathlib import Path
from typing import Literal

from megatron_brain.errors import ConfigError

log = logging.getLogger(__name__)

_START = b'{"key": "'
"""How each line of a file of verdicts begins."""

_CURE = "remove the line, or give another file with --judge-cache"

Verdict = Literal["A", "B", "tie"]

_IN_BRACKETS = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
"""The form that many published prompts ask for; C is their word for a tie."""

_LINE = re.compile(
    r"\W*(?:(?:the\s+)?(?:final\s+|better\s+)?(?:answer|response|verdict|winner|choice)(?:\s+is)?\W+)?(?:answer\s+|response\s+)?"
    r"(A|B|tie)(?:\s+is\s+(?:the\s+)?better(?:\s+(?:one|answer|response))?|\s+wins)?\W*",
    re.IGNORECASE,
)
"""A line that is a verdict and nothing else, such as `A`, `**B**`, `Answer: tie` or `Answer A is better.`"""


def parse_verdict(reply: str) -> Verdict | None:
    """The verdict of a reply; None where it has none, or two different ones.

    A verdict in double brackets counts wherever it is. Without one, the first or the last line must be a verdict.
    """
    found = {word.lower() for word in _IN_BRACKETS.findall(reply)}
    if not found:
        lines = [line for line in reply.splitlines() if line.strip()]
        matches = [_LINE.fullmatch(line) for line in (*lines[:1], *lines[-1:])]
        found = {match[1].lower() for match in matches if match}
    words: dict[str, Verdict] = {"a": "A", "b": "B", "c": "tie", "tie": "tie"}
    verdicts = {words[word] for word in found}
    return verdicts.pop() if len(verdicts) == 1 else None


class VerdictFile:
    """The file that keeps verdicts, one JSON object a line: `key`, `model`, `id`, `order`, `verdict` and `reply`.

    A line is written as soon as its verdict is there, so an evaluation that was stopped goes on from them. Lines are
    only ever added, and several runs may add to one file: what is in it stays, even where it is no verdict.

    Args:
        path: the file, which may exist. A line that an interrupted run left unfinished is passed over with a warning.

    Attributes:
        known: verdicts by key; None for a reply without one.

    Raises:
        ConfigError: another line is no verdict; names file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Verdict | None] = {}
        lines = (path.read_bytes() if path.exists() else b"").split(b"\n")
        self._last_line_is_open = bool(lines[-1])
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._read(line, f"{path}:{number}")

    def _read(self, line: bytes, where: str) -> None:
        try:
            kept = json.loads(line)
        except ValueError as error:
            if line.startswith(_START) or _START.startswith(line):
                log.warning("%s: is not whole, as an interrupted run leaves it; its verdict is asked for again", where)
                return
            raise ConfigError(f"{where}: is no verdict; {_CURE}") from error
        if not isinstance(kept, dict) or not isinstance(kept.get("key"), str) or "verdict" not in kept:
            raise ConfigError(f"{where}: is no verdict; {_CURE}")
        if kept["verdict"] not in ("A", "B", "tie", None):
            raise ConfigError(f"{where}: the verdict must be A, B, tie or null; {_CURE}")
        self.known[kept["key"]] = kept["verdict"]

    def add(self, key: str, verdict: Verdict | None, **others: str) -> None:
        """Keep a verdict, and write it at once."""
        self.known[key] = verdict
        line = json.dumps({"key": key, "verdict": verdict, **others}) + "\n"  # ASCII, for a reply may hold anything.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer a line is one call of the system, so lines of several runs do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(("\n" if self._last_line_is_open else "").encode() + line.encode())
        self._last_line_is_open = False
