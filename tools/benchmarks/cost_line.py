"""Whether time is proportional to tokens: a line through the times of groups of different sizes, and its picture."""

import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_brain.errors import ConfigError

TOLERANCE = 0.15
"""Largest relative deviation of the line's slope from proportionality, and of a size's time per token."""


def cost_line(samples: Sequence[int], tokens: Sequence[int], seconds: Sequence[float]) -> dict:
    """Fit `seconds = intercept + slope * tokens` and compare with plain proportionality.

    Returns:
        `slope_ratio`: slope / median time per token, which is 1 where time is proportional to tokens; and for each size
        its time per token / the median.
    """
    per_token = [time / count for time, count in zip(seconds, tokens, strict=True)]
    typical = statistics.median(per_token)
    slope, intercept = statistics.linear_regression(tokens, seconds)
    points = [
        {
            "samples": n,
            "tokens": count,
            "seconds": time,
            "seconds_per_token": each,
            "ratio_to_median": each / typical,
            "ratio_to_line": time / (intercept + slope * count),
        }
        for n, count, time, each in zip(samples, tokens, seconds, per_token, strict=True)
    ]
    slope_ratio = slope / typical
    return {
        "points": points,
        "slope_seconds_per_token": slope,
        "intercept_seconds": intercept,
        "median_seconds_per_token": typical,
        "slope_ratio": slope_ratio,
        "largest_deviation_from_median": max(abs(point["ratio_to_median"] - 1) for point in points),
        "largest_deviation_from_line": max(abs(point["ratio_to_line"] - 1) for point in points),
        "tolerance": TOLERANCE,
        "reached": abs(slope_ratio - 1) <= TOLERANCE,
    }


def require_matplotlib() -> None:
    """Raise ConfigError where pictures cannot be drawn, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def plot(line: dict, path: Path, *, title: str) -> None:
    """Draw measured times, the fitted line and proportionality with its tolerance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = line["points"]
    tokens, seconds = ([point[key] for point in points] for key in ("tokens", "seconds"))
    ends = [0, max(tokens) * 1.05]
    rate = line["median_seconds_per_token"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.fill_between(
        ends,
        [end * rate * (1 - TOLERANCE) for end in ends],
        [end * rate * (1 + TOLERANCE) for end in ends],
        alpha=0.15,
        label=f"proportional to tokens, ±{TOLERANCE:.0%}",
    )
    fitted = [line["intercept_seconds"] + line["slope_seconds_per_token"] * end for end in ends]
    axes.plot(ends, fitted, label=f"fitted line, slope {line['slope_ratio']:.2f} of proportional")
    axes.plot(tokens, seconds, "o", color="black", label="measured")
    for point in points:
        place = (point["tokens"], point["seconds"])
        axes.annotate(f"n={point['samples']}", place, xytext=(4, -10), textcoords="offset points")
    axes.set(xlabel="tokens: prompt + n x response", ylabel="seconds of an update", title=title, xlim=ends)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
