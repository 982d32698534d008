"""Tables of a report as text, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_brain.stages.intervals import Estimate
from reports.curves import endings
from reports.findings import Findings
from reports.quantities import Quantity, cells
from reports.runs import Setting

ABSENT = "–"
DIFFERENCES_SHOWN = (
    "win_rate/reward/policy_vs_baseline",
    "win_rate/judge/policy_vs_baseline",
    "reward/policy",
    "kl_to_prior",
    "posterior/kl_to_policy",
    "posterior/kl_alpha_beta",
)
"""Differences that the page shows; the CSV file has all of them."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def shown_tables(findings: Findings) -> list[Table]:
    """The tables of the page: the answers, the posterior, the differences and the runs."""
    tables = []
    for title, quantities in (("Answers", findings.main), ("The posterior", findings.posterior)):
        if quantities:
            tables.append(_of_settings(title, quantities, findings))
    tables += _of_differences(findings)
    tables += _of_endings(findings.settings)
    return [*tables, _of_runs(findings.settings)]


def _of_settings(title: str, quantities: Sequence[Quantity], findings: Findings) -> Table:
    rows = [
        [
            setting.name,
            str(len(setting.runs)),
            str(len(setting.runs[0].answered)),
            *(interval(findings.estimates.get((setting.name, quantity.key))) for quantity in quantities),
        ]
        for setting in findings.settings
    ]
    meanings = [f"{quantity.title} ({quantity.key}): {quantity.meaning}." for quantity in quantities]
    return Table(title, ["setting", "seeds", "prompts", *(quantity.title for quantity in quantities)], rows, meanings)


def _of_differences(findings: Findings) -> list[Table]:
    shown = [each for each in findings.differences if each.quantity.key in DIFFERENCES_SHOWN]
    if not shown:
        return []
    rows = [
        [
            f"{each.one} minus {each.other}",
            each.quantity.title,
            interval(each.estimate),
            str(len(each.seeds)),
            each.words,
        ]
        for each in shown
    ]
    note = (
        f"Both have the same seeds and prompts. Of {len(shown)} intervals of 95%, about one in twenty excludes 0 where "
        "there is no difference; nothing is corrected for that."
    )
    return [Table("Differences", ["A minus B", "quantity", "difference", "seeds", "in words"], rows, [note])]


def _of_endings(settings: Sequence[Setting]) -> list[Table]:
    """Whether the distance to the posterior was still falling when training ended."""
    found = endings(settings)
    if not found:
        return []
    rows = []
    for each in found:
        first, last_but_one, last = each.values
        where = [f"{value:.3f} ({at})" for value, at in zip(each.values, each.iterations, strict=True)]
        words = f"still falling in {each.falling} of {each.seeds} seeds" if each.falling else "not falling in any seed"
        if last >= first:
            words += "; not below the start"
        rows.append([each.name, *where, f"{last - last_but_one:+.3f}", words])
    notes = [
        "KL(posterior ‖ policy) of the validations, means of the seeds, with the training step in brackets. There is "
        "no interval over prompts, because validations have no rows.",
        "A comparison of settings that are still falling is one of these lengths of training, not of where they lead. "
        "A learning rate that falls to zero ends every change: a distance that stands still shows no optimum either.",
    ]
    columns = ["setting", "first", "last but one", "last", "change", "in words"]
    return [Table("The distance at the end of training", columns, rows, notes)]


def _of_runs(settings: Sequence[Setting]) -> Table:
    rows = [
        [setting.name, run.method, str(run.seed), run.started, run.ended, f"{run.seconds:.0f}", run.data_hash[:12]]
        for setting in settings
        for run in setting.runs
    ]
    return Table("Runs", ["setting", "method", "seed", "started", "ended", "seconds", "hash of the data"], rows)


def interval(estimate: Estimate | None) -> str:
    """A value and its interval with three decimals. A line may break between them alone."""
    if estimate is None:
        return ABSENT
    return f"{estimate.value:.3f} [{estimate.low:.3f},\u00a0{estimate.high:.3f}]"


def markdown(table: Table) -> str:
    """The table, its title and its notes in Markdown."""
    lines = [_row(table.columns), _row(["---"] * len(table.columns)), *map(_row, table.rows)]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"## {table.title}", "", *lines, *(["", *notes] if notes else []), ""])


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in texts) + " |"


def settings_csv(findings: Findings) -> str:
    """One line a setting: every quantity with the ends of its interval, in full precision."""
    quantities = (*findings.main, *findings.posterior)
    header = ["experiment", "setting", "label", "method", "seeds", "prompts"]
    header += [f"{quantity.key}{end}" for quantity in quantities for end in ("", " low", " high")]
    lines = []
    for setting in findings.settings:
        run = setting.runs[0]
        line: list[object] = [run.experiment, run.setting, run.label, run.method, len(setting.runs), len(run.answered)]
        for quantity in quantities:
            found = findings.estimates.get((setting.name, quantity.key))
            line += ["", "", ""] if found is None else [found.value, found.low, found.high]
        lines.append(line)
    return _csv(header, lines)


def seeds_csv(findings: Findings) -> str:
    """One line a run: the means of its quantities over prompts."""
    quantities = (*findings.main, *findings.posterior)
    lines = []
    for setting in findings.settings:
        for run in setting.runs:
            tables = [cells([run], quantity) for quantity in quantities]
            means = ["" if table is None else float(table.mean()) for table in tables]
            lines.append([run.experiment, run.setting, run.seed, len(run.answered), *means])
    return _csv(["experiment", "setting", "seed", "prompts", *(quantity.key for quantity in quantities)], lines)


def differences_csv(findings: Findings) -> str:
    """One line a difference and quantity."""
    lines = [
        [
            *(each.one, each.other, each.quantity.key, len(each.seeds)),
            *(each.estimate.value, each.estimate.low, each.estimate.high, each.words),
        ]
        for each in findings.differences
    ]
    return _csv(["A", "B", "quantity", "seeds", "A minus B", "low", "high", "in words"], lines)


def _csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()
