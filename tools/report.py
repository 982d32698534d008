"""Make tables, figures and a page of the runs of experiments: means with intervals over seeds and prompts.

    python tools/report.py RUNS... --out DIR [--baseline-setting NAME]

RUNS are run folders (run.json, evaluation.json, metrics.jsonl), or folders that contain them at any depth. `DIR` gets
report.html, report.md, settings.csv, seeds.csv, differences.csv and figures/. What is missing or left out is printed on
standard error and stands at the top of the page. `docs/report.md` explains the numbers.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.errors import ConfigError
from megatron_brain.files import write_whole


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Write the report. Returns the exit status."""
    args = _parse(argv)
    missing = [name for name in ("matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"report.py needs {' and '.join(missing)}: pip install -e .[report] brings them")
    from reports import figures, findings, page, runs, tables

    settings, left_out = runs.read_settings(args.runs)
    found = findings.find(settings, findings.find_baseline(settings, args.baseline_setting))
    drawn, told = figures.draw_all(found, args.out / "figures")
    notes = [*left_out, *found.notes, *told]
    shown = tables.shown_tables(found)
    html = page.html_page(
        args.title,
        settings=settings,
        tables=shown,
        figures=drawn,
        folder=args.out / "figures",
        notes=notes,
        examples=args.examples,
    )
    files = {
        "report.html": html,
        "report.md": page.markdown_page(args.title, shown, drawn, notes),
        "settings.csv": tables.settings_csv(found),
        "seeds.csv": tables.seeds_csv(found),
        "differences.csv": tables.differences_csv(found),
    }
    for name, text in files.items():
        write_whole(args.out / name, text)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(settings)} settings, {sum(len(each.runs) for each in settings)} runs: {args.out / 'report.html'}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders that contain them at any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--title", default="Results", help="heading of the report")
    parser.add_argument(
        "--baseline-setting", metavar="NAME", help="compare all settings with this one; default: all pairs"
    )
    parser.add_argument("--examples", type=int, default=12, help="prompts whose answers the page shows")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
