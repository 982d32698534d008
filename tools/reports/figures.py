"""The figures of a report, as PNG and SVG. Line styles and markers tell settings apart without colours."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy

from megatron_brain.stages.intervals import Estimate
from reports.curves import DISTANCES, Curve, Sweep, sweeps, training_curves
from reports.findings import Findings
from reports.quantities import KL_AT_MOST, MAIN, has, on_common_prompts
from reports.runs import Setting

matplotlib.use("Agg")
from matplotlib import pyplot

# Text stays text, so that a reader can search and select it; and equal numbers give equal files.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.grid": True}
matplotlib.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}

_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#7a6a00", "#56b4e9")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_STAR = {"color": "0.35", "markeredgecolor": "black", "markersize": 13}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")

REWARD, JUDGE, KL = "validation/reward_mean", "validation/judge_mean", "validation/kl_to_prior"
PRIOR_REWARD, PRIOR_JUDGE = "validation/prior_reward_mean", "validation/prior_judge_mean"
"""Each seed has a reward model with a zero of its own, so rewards are shown less the prior's."""
POSTERIOR_POINT = (
    "validation/posterior_kl_to_prior",
    "validation/posterior_reward",
    "validation/posterior_prior_reward",
)
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
    curves, notes = training_curves(findings.settings, [KL, REWARD, PRIOR_REWARD])
    if not curves:
        return [], [*notes, f"no figure of the frontier along training: no run has {KL}, {REWARD} and {PRIOR_REWARD}"]
    points, _ = training_curves(findings.settings, POSTERIOR_POINT)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for curve in curves:
        kl, gain = curve.values[KL], curve.values[REWARD] - curve.values[PRIOR_REWARD]
        ends = {"xerr": _range(kl), "yerr": _range(gain), "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(kl.mean(axis=0), gain.mean(axis=0), **ends, **style(findings, curve.name))
    for number, curve in enumerate(points):
        # The posterior does not change in training, but its estimate may, if the samples of the prior do.
        kl, reward, prior_reward = (curve.values[key].mean() for key in POSTERIOR_POINT)
        axes.plot(kl, reward - prior_reward, "*", **_STAR, label=None if number else "posterior")
    axes.set_xlabel("KL to the prior (nats)")
    axes.set_ylabel("reward above the prior's, held-out prompts")
    caption = (
        "Reward less that of the prior under the same seed's reward model, against KL to the prior, along training: "
        f"mean of the seeds at each validation; bars: range of the seeds. {_validation_prompts(findings)} "
        "The bars do not show what other prompts would give."
    )
    if points:
        caption += " Star: the posterior, the mean of the settings' estimates where there are several."
    else:
        notes.append(f"the posterior is not in the frontier along training: no run has {' and '.join(POSTERIOR_POINT)}")
    return [_finish(figure, [axes], folder, "frontier", caption)], notes


def _validation_prompts(findings: Findings) -> str:
    """A sentence on the number of prompts of the validations, from the flags of the runs' commands."""
    commands = [command for setting in findings.settings for run in setting.runs for command in run.commands]
    # Of a command's stage; the SFT stage validates, too.
    pairs = [pair for command in commands if "brain" in command for pair in itertools.pairwise(command)]
    counts = sorted({int(value) for flag, value in pairs if flag == "--max-valid-records"})
    return f"A point is of at most {' or '.join(map(str, counts))} prompts (--max-valid-records)." if counts else ""


def _frontier_at_the_end(findings: Findings, folder: Path) -> Drawn:
    keys = {setting.name: _keys_at_the_end(setting) for setting in findings.settings}
    shown = [setting for setting in findings.settings if keys[setting.name]]
    if not shown:
        return [], [f"no figure of the frontier at the end: no setting has {' and '.join(_AT_THE_END)}"]
    found, count = on_common_prompts(shown, [keys[setting.name] for setting in shown])
    if count < 2:
        return [], ["no figure of the frontier at the end: the settings have no prompts in common"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    star: dict[str, Any] = {**_STAR, "label": "posterior"}
    for setting, (kl, reward, *of_posterior) in zip(shown, found, strict=True):
        look = style(findings, setting.name) | {"linestyle": "none", "markersize": 6, "elinewidth": 0.8, "capsize": 2}
        if keys[setting.name][0] == KL_AT_MOST:
            look |= {"markerfacecolor": "none", "label": f"{setting.name} (KL at most)"}
            axes.errorbar(kl.value, reward.value, yerr=_ends(reward), **look)
        else:
            axes.errorbar(kl.value, reward.value, xerr=_ends(kl), yerr=_ends(reward), **look)
        if of_posterior:
            axes.plot(of_posterior[0].value, of_posterior[1].value, "*", **star)
            star["label"] = None
    axes.set_xlabel("KL to the prior (nats)")
    axes.set_ylabel("reward of samples of temperature 1")
    caption = (
        "Reward against KL to the prior of the trained policies, on the samples of evaluate at temperature 1, with 95% "
        f"intervals. All points are of the same {count} prompts, those that have all of the numbers. Stars: the "
        "posterior, as each setting's evaluation estimates it."
    )
    if any(own[:1] == [KL_AT_MOST] for own in keys.values()):
        caption += " Open markers: KL to the prior is a bound, which the policy does not exceed."
    notes = [f"{name} is not in the frontier at the end" for name, own in keys.items() if not own]
    return [_finish(figure, [axes], folder, "frontier_end", caption)], notes


def _keys_at_the_end(setting: Setting) -> list[str]:
    """Keys of a setting's KL, its reward and, where it has them, the same of the posterior; none if it is not shown."""
    kl, reward = _AT_THE_END
    own = next((key for key in (kl, KL_AT_MOST) if has(setting, key)), None)
    if own is None or not has(setting, reward):
        return []
    has_posterior = all(has(setting, key) for key in _POSTERIOR_AT_THE_END)
    return [own, reward, *(_POSTERIOR_AT_THE_END if has_posterior else ())]


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
    axis.errorbar(steps + aside, mean, yerr=_range(values), elinewidth=0.8, capsize=2, **look)


def _range(values: numpy.ndarray) -> list[numpy.ndarray]:
    """Lengths of bars from the mean over seeds to the smallest and the largest of `values`, `[S, T]`."""
    mean = values.mean(axis=0)
    return [mean - values.min(axis=0), values.max(axis=0) - mean]


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
    keys = [REWARD, PRIOR_REWARD, JUDGE, PRIOR_JUDGE]
    curves, notes = training_curves(findings.settings, keys)
    if not curves:
        return [], [*notes, f"no figure of judge against reward: no run has {', '.join(keys)}"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for curve in curves:
        reward, judge = (
            (curve.values[key] - curve.values[of_prior]).mean(axis=0)
            for key, of_prior in ((REWARD, PRIOR_REWARD), (JUDGE, PRIOR_JUDGE))
        )
        look = style(findings, curve.name)
        axes.plot(reward, judge, **look)
        axes.plot(reward[0], judge[0], "o", markersize=11, markerfacecolor="none", color=look["color"])
    axes.set_xlabel("training reward above the prior's, held-out prompts")
    axes.set_ylabel("judge above the prior's")
    caption = (
        "The judge against the training reward along training, both less those of the prior under the same seed, means "
        "of the seeds. No method asks the judge in training, but DPO on given pairs trains on pairs that it labelled. "
        "Large circle: the first validation. A path that goes on to the right and turns down exploits the reward."
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
