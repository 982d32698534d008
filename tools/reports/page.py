"""The report as one HTML page that needs no other file, and as Markdown."""

import base64
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from reports.figures import Figure
from reports.runs import Run, Setting
from reports.tables import Table, markdown

INTERVALS = (
    "Intervals are 95% intervals for other seeds and other prompts: a random-effects analysis of seeds by prompts, as "
    "all seeds answer the same prompts. With one seed they are over prompts alone."
)


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, and what reward and judge say of it."""

    who: str
    text: str
    scores: str


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and all answers to it."""

    text: str
    answers: list[Answer]


def html_page(
    title: str,
    *,
    settings: Sequence[Setting],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    folder: Path,
    notes: Sequence[str],
    examples: int,
) -> str:
    """The whole page. All texts of runs are escaped, and the figures of the folder are inside."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    seed = _common_seed(settings)
    return template.render(
        title=title,
        notes=notes,
        intervals=INTERVALS,
        tables=tables,
        figures=[
            {
                "name": figure.name,
                "caption": figure.caption,
                "data": base64.b64encode((folder / f"{figure.name}.svg").read_bytes()).decode(),
            }
            for figure in figures
        ],
        prompts=[] if seed is None else answered_prompts(settings, seed, examples),
        seed=seed,
        runs=[
            {"name": setting.name, "seed": run.seed, "commands": [shlex.join(command) for command in run.commands]}
            for setting in settings
            for run in setting.runs
        ],
    )


def markdown_page(title: str, tables: Sequence[Table], figures: Sequence[Figure], notes: Sequence[str]) -> str:
    """The tables and the figures, which lie in `figures/` beside the file."""
    parts = [f"# {title}\n", *(["\n".join(f"- {note}" for note in notes) + "\n"] if notes else []), INTERVALS + "\n"]
    parts += [markdown(table) for table in tables]
    parts += [
        "## Figures\n",
        *(f"![{figure.name}](figures/{figure.name}.png)\n\n{figure.caption}\n" for figure in figures),
    ]
    return "\n".join(parts)


def _common_seed(settings: Sequence[Setting]) -> int | None:
    """The first seed that every setting has."""
    return min(set.intersection(*(set(setting.seeds) for setting in settings)), default=None)


def answered_prompts(settings: Sequence[Setting], seed: int, count: int) -> list[AnsweredPrompt]:
    """The first prompts with the human reference, the SFT model's answer and that of each setting's policy."""
    runs = [(setting.name, next(run for run in setting.runs if run.seed == seed)) for setting in settings]
    return [_answered(runs, place) for place in range(min(count, len(runs[0][1].rows)))]


def _answered(runs: Sequence[tuple[str, Run]], place: int) -> AnsweredPrompt:
    rows = {name: run.rows[place] for name, run in runs if run.rows[place]}
    first = next(iter(rows.values()))
    answers = []
    if first.get("reference") is not None:
        answers.append(_answer("Human reference", first, "reference"))
    # The settings' evaluations may have drawn different answers from the SFT model.
    by_sft: dict[str, list[str]] = {}
    for name, row in rows.items():
        if "baseline" in row:
            by_sft.setdefault(row["baseline"], []).append(name)
    for names in by_sft.values():
        who = "SFT model" if len(by_sft) == 1 else f"SFT model, as evaluated with {', '.join(names)}"
        answers.append(_answer(who, rows[names[0]], "baseline"))
    answers += [_answer(name, row, "policy") for name, row in rows.items()]
    return AnsweredPrompt(first["prompt"], answers)


def _answer(who: str, row: dict, name: str) -> Answer:
    scores = [f"{kind} {row[f'{kind}/{name}']:.3f}" for kind in ("reward", "judge") if f"{kind}/{name}" in row]
    return Answer(who, row[name].strip(), ", ".join(scores))
