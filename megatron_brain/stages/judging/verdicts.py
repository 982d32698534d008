"""Verdicts of a language model: what a reply says, and the file that keeps them."""

import json
import logging
import re
from pathlib import Path
from typing import Literal

from megatron_brain.errors import ConfigError

log = logging.getLogger(__name__)

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

    A line is written as soon as its verdict is there, so an evaluation that was stopped goes on from them.

    Args:
        path: the file, which may exist. A last line that was not finished is removed, and the log says so.

    Attributes:
        known: verdicts by key; None for a reply without one.

    Raises:
        ConfigError: a line is no verdict; names file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Verdict | None] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            log.warning("%s: its last line is not whole, as an interrupted run leaves it; it is removed", path)
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                kept = json.loads(line)
                key, verdict = kept["key"], kept["verdict"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}:{number}: is no verdict; remove the line, or give another file") from error
            if verdict not in ("A", "B", "tie", None):
                raise ConfigError(f"{path}:{number}: the verdict must be A, B, tie or null; remove the line")
            self.known[key] = verdict

    def add(self, key: str, verdict: Verdict | None, **others: str) -> None:
        """Keep a verdict, and write it at once."""
        self.known[key] = verdict
        line = json.dumps({"key": key, "verdict": verdict, **others}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
