"""The one rule for records that are longer than the user allows, and the counts of what the rule did.

``overlong`` decides: "error" stops with the place of the record, "drop" leaves the record out, "truncate" cuts it:

1. the prompt to `max_prompt_length` and each response to `max_response_length`;
2. then, where prompt + longest response still exceed `seq_length`, the prompt again, but not below half of
   `seq_length`; then the responses to what is left.

A prompt loses its beginning and keeps its end, which holds the cue of the task ("TL;DR:"); BOS stays. A response
loses its end and its EOS with it: an EOS is never added to a text that did not end there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from megatron_brain.errors import ConfigError, RecordError

Ids = tuple[int, ...]


class LengthLimits(Protocol):
    """The length settings of ``megatron_brain.config.data.DataConfig``, in tokens."""

    seq_length: int
    max_prompt_length: int | None
    max_response_length: int | None
    overlong: Literal["error", "drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class ReadReport:
    """Counts of what was done with the records. All counts but `read` and the dropped ones are of kept records."""

    read: int
    kept: int
    dropped_overlong: int = 0
    dropped_unlearned: int = 0
    """Records dropped because all learned answers come after the cut."""
    dropped_dialogues: int = 0
    """Plain-text dialogues dropped because they part before their last answer, or end without one."""
    truncated_prompt: int = 0
    truncated_response: int = 0
    duplicates: int = 0
    """Records whose ids equal an earlier record's; they are kept."""
    identical_pairs: int = 0
    """Pairs with chosen = rejected; they are kept and teach nothing."""

    def as_dict(self) -> dict[str, int]:
        """Counts by name, for metrics."""
        return asdict(self)

    def __str__(self) -> str:
        counts = self.as_dict()
        read, kept = counts.pop("read"), counts.pop("kept")
        others = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
        return ", ".join([f"{read:,} records read, {kept:,} kept", *others])


def make_report(counts: Counter[str], kept: int, limits: LengthLimits) -> ReadReport:
    """The report of `kept` records.

    Raises:
        ConfigError: no record is left.
    """
    report = ReadReport(kept=kept, **counts)
    if not kept:
        cures = ["raise the length limits"] if report.dropped_overlong or report.dropped_unlearned else []
        if report.dropped_dialogues:
            cures.append("give dialogues that agree up to their last answer and end in it")
        raise ConfigError(f"no record left ({report}) at --seq-length {limits.seq_length}; {' or '.join(cures)}")
    return report


def fit_group(
    prompt: Ids, responses: Sequence[Ids], *, bos_id: int | None, limits: LengthLimits, where: str, counts: Counter[str]
) -> tuple[Ids, tuple[Ids, ...]] | None:
    """Prompt and responses within the limits, or None where the record is dropped.

    Raises:
        RecordError: the record is overlong and the rule is "error"; names `where`, the lengths and the cure.
    """
    longest = max(map(len, responses))
    max_prompt = limits.max_prompt_length or len(prompt)
    max_response = limits.max_response_length or longest
    too_long = []
    if len(prompt) > max_prompt:
        too_long.append(f"prompt of {len(prompt)} tokens (--max-prompt-length {max_prompt})")
    if longest > max_response:
        too_long.append(f"response of {longest} tokens with EOS (--max-response-length {max_response})")
    if len(prompt) + longest > limits.seq_length:
        too_long.append(f"prompt {len(prompt)} + response {longest} tokens (--seq-length {limits.seq_length})")
    if not too_long:
        return prompt, tuple(responses)
    if not keep_overlong(", ".join(too_long), limits=limits, where=where, counts=counts):
        return None
    max_prompt, max_response = min(max_prompt, len(prompt)), min(max_response, longest)
    max_prompt = min(max_prompt, max(limits.seq_length - max_response, limits.seq_length // 2))
    max_response = min(max_response, limits.seq_length - max_prompt)
    counts["truncated_prompt"] += max_prompt < len(prompt)
    counts["truncated_response"] += max_response < longest
    return cut_prompt(prompt, max_prompt, bos_id), tuple(response[:max_response] for response in responses)


def cut_prompt(prompt: Ids, length: int, bos_id: int | None) -> Ids:
    """The prompt cut to `length` tokens: its end, with BOS before it where the prompt starts with BOS."""
    if len(prompt) <= length:
        return prompt
    if prompt[0] == bos_id and length > 1:
        return (prompt[0], *prompt[-(length - 1) :])
    return prompt[-length:]


def keep_overlong(what: str, *, limits: LengthLimits, where: str, counts: Counter[str]) -> bool:
    """Whether an overlong record stays and is to be cut (True), or is dropped and counted (False).

    Raises:
        RecordError: the rule is "error".
    """
    if limits.overlong == "error":
        raise RecordError(
            where,
            "overlong",
            f"too long: {what}; raise the limit, or choose --overlong truncate or --overlong drop",
        )
    if limits.overlong == "drop":
        counts["dropped_overlong"] += 1
    return limits.overlong == "truncate"
