"""Compares the policy's answers with others by the verdicts of a language model, each pair in both orders."""

import logging
from collections.abc import Sequence
from typing import Any

from megatron_brain.errors import ConfigError
from megatron_brain.stages.judging.judge import Comparison, LanguageModelJudge
from megatron_brain.stages.judging.verdicts import Verdict

log = logging.getLogger(__name__)

OTHERS = ("baseline", "reference")
"""The answers that those of the policy are compared with."""


def compare_answers(judge: LanguageModelJudge, rows: Sequence[dict], *, max_verdicts: int) -> None:
    """Add the verdicts to the rows, as `llm/policy_vs_<other>`.

    Each pair is judged in both orders. Equal texts tie without a call. Prompts are compared in order, with all others
    that they have, as long as the verdicts of the next one stay within `max_verdicts`, whether they are known or not.
    So the result does not depend on what is known.

    Args:
        rows: one for each prompt, with `id`, `prompt` and the texts of the answers.

    Raises:
        ConfigError: the judge failed, or `max_verdicts` is too small for one prompt.
    """
    planned: list[tuple[dict, str, list[Comparison]]] = []
    keys: set[str] = set()
    compared = 0
    for row in rows:
        pairs = [(row, other, _in_both_orders(row, other)) for other in OTHERS if row.get(other) is not None]
        with_these = keys | {judge.key(comparison) for _, _, comparisons in pairs for comparison in comparisons}
        if len(with_these) > max_verdicts:
            break
        keys, compared = with_these, compared + 1
        planned += pairs
    if not compared:
        raise ConfigError(
            f"judge_max_verdicts={max_verdicts}: the first prompt needs {len(with_these)} verdicts; raise it"
        )
    if compared < len(rows):
        log.warning(
            "--judge-max-verdicts %d: the judge compares the first %d of %d prompts", max_verdicts, compared, len(rows)
        )
    verdicts = iter(judge.verdicts([comparison for _, _, comparisons in planned for comparison in comparisons]))
    for row, other, comparisons in planned:
        given = [next(verdicts) for _ in comparisons]
        row[f"llm/policy_vs_{other}"] = {"winner": _winner(given, other), "verdicts": given}


def _in_both_orders(row: dict, other: str) -> list[Comparison]:
    """The two comparisons of a pair: first with the policy's answer as A, then as B. None where the texts are equal."""
    if row["policy"] == row[other]:
        return []
    return [
        Comparison(prompt=row["prompt"], answer_a=row[a], answer_b=row[b], record_id=row["id"], order=f"{a}, {b}")
        for a, b in (("policy", other), (other, "policy"))
    ]


def _winner(verdicts: Sequence[Verdict | None], other: str) -> str | None:
    """`policy`, the other, or `tie`, which orders that disagree are too; None where a reply had no verdict."""
    if None in verdicts:
        return None
    names: list[dict[Any, str]] = [{"A": "policy", "B": other}, {"A": other, "B": "policy"}]
    winners = {name.get(verdict, "tie") for name, verdict in zip(names, verdicts)}
    return winners.pop() if len(winners) == 1 else "tie"
