"""The figures of a report, as PNG and SVG. Line styles and markers tell settings apart without colours."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy

from megatron_brain.stages.intervals import Estimate
from reports.curves import Curve, Sweep, sweeps, training_curves
from reports.findings import Findings
from reports.quantities import MAIN

matplotlib.use("Agg")
from matplotlib import pyplot

# Text stays text, so that a reader can search and select it; and equal numbers give equal files.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.grid": True}
matplotlib.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}

_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#7a6a00", "#56b4e9")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")

REWARD, JUDGE, KL = "validation/reward_mean", "validation/judge_mean", "validation/kl_to_prior"
POSTERIOR_POINT = ("validation/posterior_kl_to_prior", "validation/posterior_reward")
DISTANCES = ("validation/posterior_kl_to_policy", "validation/posterior_kl_alpha_beta")
_AT_THE_END = ("kl_to_prior", "reward/plain")
_POSTERIOR_AT_THE_END = ("posterior/kl_to_prior", "posterior/reward")
_WIN_RATES = [quantity for quantity in MAIN if quantity.key.startswith("win_rate/")]
_BY_SETTING = ("win_rate/reward/policy_vs_baseline", "win_rate/judge/policy_vs_baseline", "posterior/kl_to_policy")


@dataclass(frozen=True)
class Figure:
    """A figure that lies in the folder as NAME.png and NAME.svg."""

    name: str
    caption: str


def draw_all(findings: Findings, folder: Path) -> tuple[list[Figure], list[str]]:
    """Write the figures for which the files have the numbers.

    Returns:
        the figures, and a sentence for each that is left out, or leaves a setting out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    notes: list[str] = []
    for draw in (_frontier, _frontier_at_the_end, _distances, _win_rates, _judge_against_reward, _by_numeric_settings):
        drawn, told = draw(findings, folder)
        figures += drawn
        notes += told
    return figures, list(dict.fromkeys(notes))


def style(findings: Findings, name: str) -> dict[str, Any]:
    """Colour, line and marker of a setting, the same in all figures."""
    place = [setting.name for setting in findings.settings].index(name)
    return _style(place) | {"label": name}


def _style(place: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "linestyle": _LINES[place % len(_LINES)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 4,
    }


Drawn = tuple[list[Figure], list[str]]


def _frontier(findings: Findings, folder: Path) -> Drawn:
    curves, notes = training_curves(findings.settings, [KL, REWARD])
    if not curves:
        return [], [*notes, f"no figure of the frontier along training: no run has {KL} and {REWARD}"]
    points, _ = training_curves(findings.settings, POSTERIOR_POINT)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for curve in curves:
        kl, reward = curve.values[KL], curve.values[REWARD]
        look = style(findings, curve.name)
        for of_seed in range(len(kl)):
            axes.plot(kl[of_seed], reward[of_seed], color=look["color"], linewidth=0.5, alpha=0.4)
        axes.plot(kl.mean(axis=0), reward.mean(axis=0), **look)
    for number, curve in enumerate(points):
        # The posterior does not change in training, but its estimate may, if the samples of the prior do.
        x, y = (curve.values[key].mean() for key in POSTERIOR_POINT)
        axes.plot(
            x, y, "*", color="0.35", markeredgecolor="black", markersize=13, label=None if number else "posterior"
        )
    axes.set_xlabel("KL to the prior (nats)")
    axes.set_ylabel("reward on held-out prompts")
    caption = (
        "Reward against KL to the prior along training, on the held-out prompts of the validations. Thick: mean of the "
        "seeds, a marker for each validation; thin: each seed."
    )
    if points:
        caption += " Star: the posterior, the mean of the settings' estimates where there are several."
    else:
        notes.append(f"the posterior is not in the frontier along training: no run has {' and '.join(POSTERIOR_POINT)}")
    return [_finish(figure, [axes], folder, "frontier", caption)], notes


def _frontier_at_the_end(findings: Findings, folder: Path) -> Drawn:
    found = {setting.name: _estimates(findings, setting.name, _AT_THE_END) for setting in findings.settings}
    if not any(found.values()):
        return [], [f"no figure of the frontier at the end: no setting has {' and '.join(_AT_THE_END)}"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    star: dict[str, Any] = {"color": "0.35", "markeredgecolor": "black", "markersize": 13, "label": "posterior"}
    for name, of_policy in found.items():
        if of_policy is not None:
            kl, reward = of_policy
            look = style(findings, name) | {"linestyle": "none", "markersize": 6}
            axes.errorbar(kl.value, reward.value, xerr=_ends(kl), yerr=_ends(reward), elinewidth=0.8, capsize=2, **look)
        of_posterior = _estimates(findings, name, _POSTERIOR_AT_THE_END)
        if of_posterior is not None:
            axes.plot(of_posterior[0].value, of_posterior[1].value, "*", **star)
            star["label"] = None
    axes.set_xlabel("KL to the prior (nats)")
    axes.set_ylabel("reward of samples of temperature 1")
    caption = (
        "Reward against KL to the prior of the trained policies, on the samples of evaluate at temperature 1, with 95% "
        "intervals. Stars: the posterior, as each setting's evaluation estimates it."
    )
    notes = [f"{name} is not in the frontier at the end" for name, of_policy in found.items() if of_policy is None]
    return [_finish(figure, [axes], folder, "frontier_end", caption)], notes


def _distances(findings: Findings, folder: Path) -> Drawn:
    found = [(key, *training_curves(findings.settings, [key])) for key in DISTANCES]
    notes = [note for _, _, told in found for note in told]
    panels = [(key, curves) for key, curves, _ in found if curves]
    if not panels:
        return [], [*notes, f"no figure of the distance to the posterior: no run has {' or '.join(DISTANCES)}"]
    titles = dict(zip(DISTANCES, ("KL(posterior ‖ policy) (nats)", "KL(alpha ‖ beta) (nats)"), strict=True))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (key, curves) in zip(axes[0], panels, strict=True):
        for place, curve in enumerate(curves):
            _mean_and_range(axis, curve, key, style(findings, curve.name), place - (len(curves) - 1) / 2)
        axis.set_xlabel("training step")
        axis.set_ylabel(titles[key])
    caption = (
        "Distance to the posterior on held-out prompts along training: mean of the seeds, and their range as a bar. "
        "Lines are moved a little to the side of each other."
    )
    return [_finish(figure, list(axes[0]), folder, "distance", caption)], notes


def _mean_and_range(axis: Any, curve: Curve, key: str, look: dict[str, Any], place: float) -> None:
    values, steps = curve.values[key], curve.iterations
    mean = values.mean(axis=0)
    # Bars of several settings at one step would hide each other.
    aside = place * 0.05 * (numpy.diff(steps).min() if len(steps) > 1 else 1)
    ends = [mean - values.min(axis=0), values.max(axis=0) - mean]
    axis.errorbar(steps + aside, mean, yerr=ends, elinewidth=0.8, capsize=2, **look)


def _win_rates(findings: Findings, folder: Path) -> Drawn:
    shown = [quantity for quantity in _WIN_RATES if quantity in findings.main]
    if not shown:
        return [], ["no figure of win-rates: no setting has one"]
    names = [setting.name for setting in findings.settings]
    figure, axes = pyplot.subplots(figsize=(6.4, 1.2 + 0.45 * len(names)), layout="constrained")
    for number, quantity in enumerate(shown):
        rows = [(place, findings.estimates.get((name, quantity.key))) for place, name in enumerate(names)]
        known = [(place + 0.22 * (number - (len(shown) - 1) / 2), each) for place, each in rows if each is not None]
        values = [each.value for _, each in known]
        errors = [[_ends(each)[side][0] for _, each in known] for side in (0, 1)]
        look = _style(number) | {"linestyle": "none", "markersize": 6, "label": quantity.title, "capsize": 2}
        axes.errorbar(values, [place for place, _ in known], xerr=errors, elinewidth=1, **look)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("win-rate of the policy")
    caption = "Win-rates with 95% intervals over seeds and prompts; at the dotted line neither side wins more often."
    return [_finish(figure, [axes], folder, "win_rates", caption)], []


def _judge_against_reward(findings: Findings, folder: Path) -> Drawn:
    curves, notes = training_curves(findings.settings, [REWARD, JUDGE])
    if not curves:
        return [], [*notes, f"no figure of judge against reward: no run has {REWARD} and {JUDGE}"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for curve in curves:
        reward, judge = (curve.values[key].mean(axis=0) for key in (REWARD, JUDGE))
        look = style(findings, curve.name)
        axes.plot(reward, judge, **look)
        axes.plot(reward[0], judge[0], "o", markersize=11, markerfacecolor="none", color=look["color"])
    axes.set_xlabel("training reward on held-out prompts")
    axes.set_ylabel("judge on held-out prompts")
    caption = (
        "The judge, which the policy never sees, against the training reward along training, means of the seeds. Large "
        "circle: the first validation. A path that goes on to the right and turns down exploits the reward."
    )
    return [_finish(figure, [axes], folder, "judge_against_reward", caption)], notes


def _by_numeric_settings(findings: Findings, folder: Path) -> Drawn:
    figures = []
    quantities = [each for each in (*findings.main, *findings.posterior) if each.key in _BY_SETTING]
    found = sweeps(findings.settings)
    if found and not quantities:
        return [], [f"no figure by {', '.join(found)}: no setting has {', '.join(_BY_SETTING)}"]
    for flag, lines in found.items():
        shape = {"figsize": (4.2 * len(quantities), 3.6), "squeeze": False, "layout": "constrained"}
        figure, axes = pyplot.subplots(1, len(quantities), **shape)
        for axis, quantity in zip(axes[0], quantities, strict=True):
            of_setting = {name: each for (name, key), each in findings.estimates.items() if key == quantity.key}
            _along(axis, lines, of_setting)
            axis.set_xlabel(flag)
            axis.set_ylabel(quantity.title)
        caption = f"By {flag}, with 95% intervals over seeds and prompts."
        changing = sorted({name for line in lines for name in line.changing})
        if changing:
            caption += f" Along a line these change, too: {', '.join(changing)}."
        name = "by_" + re.sub(r"\W", "_", flag.lstrip("-"))
        figures.append(_finish(figure, list(axes[0]), folder, name, caption))
    return figures, []


def _along(axis: Any, lines: Sequence[Sweep], of_setting: dict[str, Estimate]) -> None:
    """Draw one quantity along a flag, on a scale of doublings if its values span two or more."""
    values = sorted({value for line in lines for value, _ in line.points})
    doubling = values[0] > 0 and values[-1] / values[0] >= 4
    for number, line in enumerate(lines):
        known = [(value, of_setting[name]) for value, name in line.points if name in of_setting]
        # Intervals of several lines at one value would hide each other.
        place = number - (len(lines) - 1) / 2
        step = 0.01 * place * (values[-1] - values[0])
        aside = [value * 2 ** (0.05 * place) if doubling else value + step for value, _ in known]
        errors = [[_ends(each)[side][0] for _, each in known] for side in (0, 1)]
        look = _style(number) | {"label": line.title, "capsize": 2, "elinewidth": 0.8}
        axis.errorbar(aside, [each.value for _, each in known], yerr=errors, **look)
    if doubling:
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()


def _estimates(findings: Findings, name: str, keys: Sequence[str]) -> list[Estimate] | None:
    found = [findings.estimates.get((name, key)) for key in keys]
    return None if any(each is None for each in found) else [each for each in found if each is not None]


def _ends(estimate: Estimate) -> list[list[float]]:
    """Lengths of the error bar below and above, as matplotlib takes them."""
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]


def _finish(figure: Any, axes: list[Any], folder: Path, name: str, caption: str) -> Figure:
    """Add the legend below the panels, and write both files."""
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = list(named)
    columns = 1 if max(map(len, labels)) > 40 else 2 if max(map(len, labels)) > 20 else 3
    figure.legend(named.values(), labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", dpi=160)
    pyplot.close(figure)
    return Figure(name, caption)
