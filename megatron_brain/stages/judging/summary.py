"""What the verdicts of a language model say: win-rates, its own faults, and its agreement with other scores."""

from collections.abc import Sequence

import numpy

from megatron_brain.stages.comparison import wins_over
from megatron_brain.stages.intervals import Estimate, bootstrap, bootstrap_statistic, ratio
from megatron_brain.stages.judging.comparison import OTHERS

_POINTS = {"policy": 1.0, "tie": 0.5}


def summarize_verdicts(rows: Sequence[dict], *, bootstrap_samples: int, seed: int) -> dict[str, Estimate]:
    """Metrics of the comparisons that rows hold, with 95% intervals over prompts.

    Args:
        rows: one for each prompt, as `compare_answers` leaves them, with rewards and judge scores where there are some.

    Returns:
        for each comparison C, such as `policy_vs_baseline`, over the prompts that were compared: `win_rate/llm/C`
        without prompts with an unparsable verdict, `llm/ties/C` of the same prompts, `llm/unparsable/C` of all
        verdicts, `llm/position_bias/C`, the share of verdicts for the answer in the first place among those for an
        answer, and for each other kind of scores `llm/agreement/<kind>/C` and `llm/kappa/<kind>/C`. What has no value
        is left out.
    """
    metrics: dict[str, Estimate | None] = {}
    resampling = {"samples": bootstrap_samples, "seed": seed}
    for other in OTHERS:
        name = f"policy_vs_{other}"
        compared = [row for row in rows if f"llm/{name}" in row]
        results = [row[f"llm/{name}"] for row in compared]
        decided = [row for row, result in zip(compared, results, strict=True) if result["winner"] is not None]
        points = [_POINTS.get(row[f"llm/{name}"]["winner"], 0.0) for row in decided]
        if points:
            metrics[f"win_rate/llm/{name}"] = bootstrap(points, **resampling)
            metrics[f"llm/ties/{name}"] = bootstrap([float(point == 0.5) for point in points], **resampling)
        if not results:
            continue
        verdicts = [result["verdicts"] for result in results]
        firsts = [of_pair.count("A") for of_pair in verdicts]
        answers = [of_pair.count("A") + of_pair.count("B") for of_pair in verdicts]
        unparsable, asked = [of_pair.count(None) for of_pair in verdicts], [len(of_pair) for of_pair in verdicts]
        metrics[f"llm/position_bias/{name}"] = bootstrap_statistic([firsts, answers], ratio, **resampling)
        metrics[f"llm/unparsable/{name}"] = bootstrap_statistic([unparsable, asked], ratio, **resampling)
        for kind in ("reward", "judge"):
            pair = _both_decided(decided, points, kind, other)
            if pair is not None:
                metrics[f"llm/agreement/{kind}/{name}"] = bootstrap_statistic(pair, _agreement, **resampling)
                metrics[f"llm/kappa/{kind}/{name}"] = bootstrap_statistic(pair, _kappa, **resampling)
    return {name: estimate for name, estimate in metrics.items() if estimate is not None}


def count_verdicts(rows: Sequence[dict]) -> dict[str, dict[str, int]]:
    """For each comparison the numbers of prompts with both answers, of prompts that were compared, of these with equal
    texts, with orders that named different winners, and with an unparsable verdict; and of unparsable verdicts."""
    counts = {}
    for other in OTHERS:
        results = [row[f"llm/policy_vs_{other}"] for row in rows if f"llm/policy_vs_{other}" in row]
        counts[f"policy_vs_{other}"] = {
            "prompts": sum(row.get(other) is not None for row in rows),
            "compared": len(results),
            "equal_texts": sum(not result["verdicts"] for result in results),
            "orders_disagree": sum(_disagree(result["verdicts"]) for result in results),
            "undecided": sum(result["winner"] is None for result in results),
            "unparsable_verdicts": sum(result["verdicts"].count(None) for result in results),
        }
    return {name: of_pair for name, of_pair in counts.items() if of_pair["prompts"]}


def _disagree(verdicts: Sequence[str | None]) -> bool:
    """Whether the orders name different winners. The same answer is A in one order and B in the other."""
    return bool(verdicts) and None not in verdicts and list(verdicts) not in (["A", "B"], ["B", "A"], ["tie", "tie"])


def _both_decided(rows: Sequence[dict], points: Sequence[float], kind: str, other: str) -> list[list[float]] | None:
    """`[2, prompts]`: 1 where the policy wins and 0 where it loses, by the language model and by the scores `kind`, of
    the prompts where neither ties. None where there are none."""
    won = wins_over(rows, kind, "policy", other)
    if won is None:
        return None
    pairs = [[mine, theirs] for mine, theirs in zip(points, won, strict=True) if 0.5 not in (mine, theirs)]
    return [list(column) for column in zip(*pairs, strict=True)] or None


def _agreement(columns: numpy.ndarray) -> numpy.ndarray:
    """`[2, samples, prompts]` -> `[samples]`: the share of prompts with equal winners."""
    return (columns[0] == columns[1]).mean(axis=-1)


def _kappa(columns: numpy.ndarray) -> numpy.ndarray:
    """`[2, samples, prompts]` -> `[samples]`: agreement beyond that of chance (Cohen 1960). NaN where chance alone
    gives full agreement."""
    one, other = columns.mean(axis=-1)
    by_chance = one * other + (1 - one) * (1 - other)
    beyond = _agreement(columns) - by_chance
    return numpy.divide(beyond, 1 - by_chance, out=numpy.full(one.shape, numpy.nan), where=by_chance < 1)
