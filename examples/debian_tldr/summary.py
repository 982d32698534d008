"""Print the results of the example's run: the numbers of each stage, and prompts with their answers side by side.

    python examples/debian_tldr/summary.py --sft-metrics sft/metrics.jsonl --reward-metrics reward/metrics.jsonl \\
        --brain-metrics brain/metrics.jsonl --evaluation evaluation.json

reads the `metrics.jsonl` of the three stages (one JSON object per iteration) and the result of the evaluate stage. If a
number is not in the files, an error names it: no number is guessed or left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.box import ASCII, ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text
from user_errors import UserError, run

PROMPT_SUFFIX = "\nTL;DR:"
PLAIN_WIDTH = 120
"""Columns of the output where it is not a terminal."""


def main() -> None:
    args = parse_args()
    stages = stage_rows(args.sft_metrics, args.reward_metrics, args.brain_metrics)
    evaluation = read_evaluation(args.evaluation)
    if len(evaluation["examples"]) < args.examples:
        raise UserError(
            f"{args.evaluation}: has {len(evaluation['examples'])} examples, --examples asks for {args.examples}"
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH, color_system=None)
    for table in (
        stage_table(stages),
        evaluation_table(evaluation),
        example_table(evaluation["examples"][: args.examples], args.max_prompt_words),
    ):
        table.box = ROUNDED if console.is_terminal else ASCII
        console.print(table)
    for sentence in findings(evaluation):
        console.print(sentence, soft_wrap=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Print the numbers of each stage and some answers side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sft-metrics", type=Path, required=True, help="metrics.jsonl of the sft stage")
    parser.add_argument("--reward-metrics", type=Path, required=True, help="metrics.jsonl of the reward stage")
    parser.add_argument("--brain-metrics", type=Path, required=True, help="metrics.jsonl of the brain stage")
    parser.add_argument("--evaluation", type=Path, required=True, help="result of the evaluate stage, a JSON file")
    parser.add_argument("--examples", type=int, default=3, help="prompts to show with their answers")
    parser.add_argument("--max-prompt-words", type=int, default=40, help="words of each prompt to show")
    return parser.parse_args()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl.

    Raises:
        UserError: a line is not a JSON object, or there are no lines.
    """
    lines = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            lines.append(parse_object(line, f"{path}, line {number}"))
    if not lines:
        raise UserError(f"{path} is empty: the stage has logged no iteration")
    return lines


def parse_object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, found a {type(value).__name__}")
    return value


def series(lines: list[dict[str, Any]], key: str, path: Path, at_least: int = 1) -> list[tuple[int, float]]:
    """Iteration and value of each line that has `key`, in the order of the file.

    Raises:
        UserError: fewer than `at_least` lines have it.
    """
    found = [line for line in lines if key in line]
    if len(found) < at_least:
        names = ", ".join(sorted({name for line in lines for name in line}))
        raise UserError(f"{path}: {len(found)} lines have {key!r}, the summary needs {at_least}; keys found: {names}")
    for line in found:
        if "iteration" not in line:
            raise UserError(f"{path}: a line with {key!r} has no 'iteration'")
    return [(line["iteration"], line[key]) for line in found]


def stage_rows(sft: Path, reward: Path, brain: Path) -> list[tuple[str, str, str]]:
    """Rows (stage, metric, value) for the table of the training stages."""
    rows = []
    first, *_, last = series(read_metrics(sft), "validation/loss", sft, at_least=2)
    rows.append(("sft", "validation loss before", f"{first[1]:.3f} (iteration {first[0]})"))
    rows.append(("sft", "validation loss after", f"{last[1]:.3f} (iteration {last[0]})"))
    lines = read_metrics(reward)
    series(lines, "validation/accuracy", reward)
    for key in sorted({key for line in lines for key in line if key.startswith("validation/accuracy")}):
        iteration, value = series(lines, key, reward)[-1]
        rows.append(("reward", key.replace("/", " ", 1), f"{value:.3f} (iteration {iteration})"))
    losses = series(read_metrics(brain), "loss", brain)
    rows.append(("brain", "loss of the first step", f"{losses[0][1]:.4f} (iteration {losses[0][0]})"))
    rows.append(("brain", "loss of the last step", f"{losses[-1][1]:.4f} (iteration {losses[-1][0]})"))
    return rows


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read the result of the evaluate stage.

    Raises:
        UserError: keys that the summary shows are missing; names all of them.
    """
    evaluation = parse_object(path.read_text(encoding="utf-8"), str(path))
    missing = [key for key in ("num_prompts", "metrics", "examples") if key not in evaluation]
    for name, metric in evaluation.get("metrics", {}).items():
        missing += [f"metrics/{name}/{key}" for key in ("value", "low", "high") if key not in metric]
    for index, example in enumerate(evaluation.get("examples", [])):
        keys = ("prompt", "reference", "baseline", "response")
        missing += [f"examples/{index}/{key}" for key in keys if key not in example]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}; run evaluate with --baseline-load and references")
    return evaluation


def stage_table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table("stage", "metric", "value", title="Training", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    table = Table(title=f"Evaluation on {evaluation['num_prompts']} held-out prompts", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95% interval")
    for name, metric in evaluation["metrics"].items():
        interval = f"{metric['low']:.3f} to {metric['high']:.3f}"
        table.add_row(Text(name), f"{metric['value']:.3f}", interval)
    return table


def findings(evaluation: dict[str, Any]) -> list[str]:
    """What the win-rates of BRAIn against SFT show, in words. An interval that contains one half shows nothing."""
    sentences = []
    for kind, scorer in (("reward", "the reward model"), ("judge", "the judge")):
        metric = evaluation["metrics"].get(f"win_rate/{kind}/policy_vs_baseline")
        if metric is None:
            continue
        if metric["low"] > 0.5:
            verdict = "BRAIn's answers are better than SFT's"
        elif metric["high"] < 0.5:
            verdict = "BRAIn's answers are worse than SFT's"
        else:
            verdict = "no difference between BRAIn and SFT is shown"
        interval = f"{metric['low']:.3f} to {metric['high']:.3f}"
        sentences.append(f"Under {scorer}, {verdict}: win-rate {metric['value']:.3f}, 95% interval {interval}.")
    if sentences:
        sentences.append(
            "The intervals are over prompts. Another seed gives another policy, and perhaps another answer."
        )
    return sentences


def example_table(examples: list[dict[str, Any]], max_prompt_words: int) -> Table:
    table = Table(title="Answers", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    for name in ("human", "SFT", "BRAIn"):
        table.add_column(name, ratio=1)
    for example in examples:
        answers = (example[key].strip() for key in ("reference", "baseline", "response"))
        table.add_row(Text(shorten(example["prompt"], max_prompt_words)), *(Text(answer) for answer in answers))
    return table


def shorten(prompt: str, max_words: int) -> str:
    """The prompt's first words on one line, with ` ...` where more follow."""
    words = prompt.removesuffix(PROMPT_SUFFIX).split()
    return " ".join(words[:max_words]) + (" ..." if len(words) > max_words else "")


if __name__ == "__main__":
    run(main)
