"""Metrics of several runs side by side, as a table and a figure.

    python tools/compare_runs.py fp32=runs/a/metrics.jsonl hybrid=runs/b/metrics.jsonl [--metrics loss,reward_mean]
        [--window 8] [--plot FILE]

Prints a table in Markdown with means over windows of steps. The figure, which needs matplotlib, shows every step. A
metric that is logged once a round counts at the steps that log it.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_brain.commands.reporting import reports_mistakes
from megatron_brain.errors import ConfigError

Runs = dict[str, list[dict[str, Any]]]
"""Lines of metrics.jsonl by the name of the run."""


@reports_mistakes
def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE", help="metrics.jsonl of a run and what to call it")
    parser.add_argument("--metrics", default="loss,reward_mean,ess_alpha,ess_beta,max_ratio", help="[%(default)s]")
    parser.add_argument("--window", type=int, default=8, help="steps that are averaged [%(default)s]")
    parser.add_argument("--plot", type=Path, help="figure to write")
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if args.window < 1:
        raise ConfigError(f"--window {args.window}: must be at least 1")
    runs, metrics = read_runs(args.runs), args.metrics.split(",")
    print(table(runs, metrics, args.window))
    if args.plot:
        plot(runs, metrics, args.plot)
    return 0


def read_runs(named: Sequence[str]) -> Runs:
    """Read the file of each `NAME=FILE`.

    Raises:
        ConfigError: a name is missing or given twice, a file is missing or empty, or a line is incomplete.
    """
    runs = {}
    for each in named:
        name, _, file = each.partition("=")
        if not file or not Path(file).is_file():
            raise ConfigError(f"{each}: expected NAME=FILE with the metrics.jsonl of a run")
        if name in runs:
            raise ConfigError(f"{each}: there is another run of the name {name}")
        try:
            lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} has a line that is not whole ({error}): a run may be writing it") from None
        if not lines:
            raise ConfigError(f"{file} holds no metrics")
        runs[name] = lines
    return runs


def values(lines: Sequence[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """The iterations that logged the metric, and its values.

    Raises:
        ConfigError: no iteration did.
    """
    # Numbers that are not finite were written as text.
    found = [(line["iteration"], float(line[metric])) for line in lines if metric in line]
    if not found:
        there = sorted({key for line in lines for key in line})
        raise ConfigError(f"no step logged {metric}; there are {', '.join(there)}")
    iterations, logged = zip(*found, strict=True)
    return list(iterations), list(logged)


def table(runs: Runs, metrics: Sequence[str], window: int) -> str:
    """Means over steps 1 to `window`, and so on, up to the last step that all runs have."""
    last = min(lines[-1]["iteration"] for lines in runs.values())
    windows = [(start + 1, min(start + window, last)) for start in range(0, last, window)]
    rows = [["metric", "run", *(f"steps {first}-{end}" for first, end in windows)]]
    for metric in metrics:
        for name, lines in runs.items():
            logged = list(zip(*values(lines, metric), strict=True))
            inside = [[value for step, value in logged if first <= step <= end] for first, end in windows]
            rows.append([metric, name, *(f"{statistics.mean(each):.3g}" if each else "" for each in inside)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(runs: Runs, metrics: Sequence[str], path: Path) -> None:
    """Draw a panel for each metric, with a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(metrics), figsize=(8, 2.4 * len(metrics)), sharex=True, squeeze=False)
    for metric, axes in zip(metrics, panels[:, 0], strict=True):
        for name, lines in runs.items():
            axes.plot(*values(lines, metric), label=name, linewidth=1)
        axes.set_ylabel(metric)
    panels[0, 0].legend()
    panels[-1, 0].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
