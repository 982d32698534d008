"""The quantities of a report: what they are called, and their cells of seeds by prompts from the rows of evaluate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from megatron_brain.errors import ConfigError
from megatron_brain.stages.intervals import Estimate, wins
from reports.crossed import crossed_interval, ratio_cells
from reports.runs import Run, Setting

KL_AT_MOST = "kl_to_prior_at_most"
GAIN = "posterior/reward_gain_reached"
_GAIN_OF = ("reward/plain", "posterior/prior_reward", "posterior/reward")
"""What the gain is made of."""


@dataclass(frozen=True)
class Quantity:
    """A number of every prompt, by its key in the rows or metrics of evaluate."""

    key: str
    title: str
    meaning: str
    bounds: tuple[float, float] | None = None
    of_policy: bool = True
    """Whether it says something of the policy, so that a difference of settings is of interest."""
    optional: bool = False
    """Whether nobody needs to hear that no run has it."""


MAIN = (
    Quantity(
        "win_rate/reward/policy_vs_baseline",
        "win-rate: reward, vs SFT",
        "share of prompts where the policy's answer has a larger training reward than the SFT model's; a tie is 1/2",
        (0, 1),
    ),
    Quantity(
        "win_rate/reward/policy_vs_reference",
        "win-rate: reward, vs human",
        "share of prompts where the training reward prefers the policy's answer to the human reference",
        (0, 1),
    ),
    Quantity(
        "win_rate/judge/policy_vs_baseline",
        "win-rate: judge, vs SFT",
        "share of prompts where the judge prefers it to the SFT model's; no method asks the judge in training, but DPO "
        "on given pairs trains on pairs that the judge labelled",
        (0, 1),
    ),
    Quantity(
        "win_rate/llm/policy_vs_baseline",
        "win-rate: language model, vs SFT",
        "share of prompts where a language model prefers it to the SFT model's, asked in both orders",
        (0, 1),
        optional=True,
    ),
    Quantity(
        "win_rate/llm/policy_vs_reference",
        "win-rate: language model, vs human",
        "the same against the human reference, by the language model",
        (0, 1),
        optional=True,
    ),
    Quantity("reward/policy", "reward", "mean training reward of the policy's answers"),
    Quantity("reward/baseline", "reward of SFT", "mean training reward of the SFT model's answers", of_policy=False),
    Quantity("judge/policy", "judge", "mean score of the judge for the policy's answers"),
    Quantity("judge/baseline", "judge of SFT", "mean score of the judge for the SFT model's answers", of_policy=False),
    Quantity("kl_to_prior", "KL to the prior", "KL(policy ‖ prior) on fresh samples of temperature 1, nats"),
    Quantity(
        KL_AT_MOST,
        "KL to the prior, at most",
        "a bound by a formula, no measurement: that of best-of-n, whose answers are sampled at temperature 1",
        optional=True,
    ),
    Quantity("length/policy", "length", "tokens of the policy's answers"),
)
POSTERIOR = (
    Quantity("posterior/kl_to_policy", "KL(posterior ‖ policy)", "with the policy's exact probabilities, nats"),
    Quantity("posterior/kl_from_policy", "KL(policy ‖ posterior)", "on the policy's own samples, nats"),
    Quantity("posterior/kl_alpha_beta", "KL(alpha ‖ beta)", "self-normalised, over the samples of the prior, nats"),
    Quantity(GAIN, "share of the gain", "gain in reward over the prior, divided by that of the posterior"),
    Quantity("reward/plain", "reward, plain", "mean reward of the policy's samples of temperature 1"),
    Quantity("posterior/reward", "of the posterior", "the posterior's expected reward", of_policy=False),
    Quantity("posterior/prior_reward", "of the prior", "the prior's expected reward", of_policy=False),
    Quantity("posterior/kl_to_prior", "KL(posterior ‖ prior)", "nats", of_policy=False),
    Quantity(
        "posterior/ess_alpha", "ESS of alpha", "effective sample size of the posterior's weights", of_policy=False
    ),
    Quantity("posterior/ess_beta", "ESS of beta", "effective sample size of the policy's weights"),
)
"""The quantities of the second table, which is about the posterior; the first is about answers."""


def known(settings: Sequence[Setting]) -> tuple[list[Quantity], list[Quantity], list[str]]:
    """The quantities of the two tables that some setting has, and sentences on those that runs or prompts lack.

    Numbers `posterior/...` that are not in POSTERIOR follow with their keys as titles.
    """
    named = {quantity.key for quantity in POSTERIOR}
    keys = {key for setting in settings for run in setting.runs for key in run.answered[0]}
    others = sorted(key for key in keys - named if key.startswith("posterior/"))
    further = [Quantity(key, key.removeprefix("posterior/"), f"{key} of evaluate") for key in others]
    kept: tuple[list[Quantity], list[Quantity]] = ([], [])
    notes, nowhere = [], []
    for table, quantities in zip(kept, (MAIN, (*POSTERIOR, *further)), strict=True):
        for quantity in quantities:
            lacking = [setting.name for setting in settings if cells(setting.runs, quantity) is None]
            if len(lacking) < len(settings):
                table.append(quantity)
            if len(lacking) == len(settings) and not quantity.optional:
                nowhere.append(quantity.key)
            elif 0 < len(lacking) < len(settings) and quantity.key != KL_AT_MOST:
                notes.append(f"{quantity.key} ({quantity.title}) has no number for {', '.join(lacking)}: runs lack it")
    if nowhere:
        notes.append(f"no setting has these in all its runs, so they are not shown: {', '.join(nowhere)}")
    return *kept, [*notes, *_fewer_prompts(settings, (*kept[0], *kept[1]))]


def _fewer_prompts(settings: Sequence[Setting], quantities: Sequence[Quantity]) -> list[str]:
    """A sentence for each setting and number of prompts by which some quantities are known."""
    notes = []
    for setting in settings:
        tables = {quantity.title: cells(setting.runs, quantity) for quantity in quantities}
        every = len(setting.runs[0].answered)
        counts = {title: table.shape[1] for title, table in tables.items() if table is not None}
        for count in sorted({*counts.values()} - {every}):
            titles = ", ".join(title for title, number in counts.items() if number == count)
            notes.append(f"{setting.name}: {count} of {every} prompts have {titles}")
    return notes


def cells(runs: Sequence[Run], quantity: Quantity, *, beside: Sequence[Run] = ()) -> numpy.ndarray | None:
    """Float `[seeds, prompts]` with the quantity as its mean; None if a run, or all prompts but one, lack it.

    Prompts without it, in these runs or in those `beside` them, are left out.

    Raises:
        ConfigError: the runs have it for different prompts, or its mean is not the one that evaluate wrote.
    """
    names = _GAIN_OF if quantity.key == GAIN else (quantity.key,)
    if any(_column(run, name) is None for run in (*runs, *beside) for name in names):
        return None
    # Only the first prompts may have samples of the prior (--posterior-prompts), so the last name decides.
    shared = _shared_prompts(runs, names[-1])
    if beside:
        shared &= _shared_prompts(beside, names[-1])
    if shared.sum() < 2:
        return None
    tables = [_table(runs, name)[:, shared] for name in names]
    if quantity.key != GAIN:
        return tables[0]
    plain, prior, posterior = tables
    return ratio_cells(plain - prior, posterior - prior)


def estimate(setting: Setting, quantity: Quantity) -> Estimate | None:
    """The quantity over seeds and prompts with its interval; None if it has none."""
    table = cells(setting.runs, quantity)
    return None if table is None else crossed_interval(table, bounds=quantity.bounds)


def on_common_prompts(settings: Sequence[Setting], keys: Sequence[Sequence[str]]) -> tuple[list[list[Estimate]], int]:
    """Numbers of several settings over the prompts that have all of them in all of the settings.

    Args:
        keys: for each setting the keys of its rows.

    Returns:
        the estimates by setting and key, and the number of prompts; no estimates for less than two prompts.
    """
    needed = [(setting, key) for setting, own in zip(settings, keys, strict=True) for key in own]
    shared = numpy.logical_and.reduce([_shared_prompts(setting.runs, key) for setting, key in needed])
    count = int(shared.sum())
    if count < 2:
        return [[] for _ in settings], count
    tables = [
        [_table(setting.runs, key)[:, shared] for key in own] for setting, own in zip(settings, keys, strict=True)
    ]
    return [[crossed_interval(table) for table in own] for own in tables], count


def has(setting: Setting, key: str) -> bool:
    """Whether each run of the setting has a number of its rows for some prompt."""
    return all(_column(run, key) is not None for run in setting.runs)


def difference(one: Setting, other: Setting, quantity: Quantity) -> tuple[Estimate, tuple[int, ...]] | None:
    """Mean of `one` minus that of `other` over the same seeds and prompts, and the seeds that both have.

    None if no seed is in both, or a run lacks the quantity.
    """
    seeds = tuple(seed for seed in one.seeds if seed in other.seeds)
    if not seeds:
        return None
    ours, theirs = ([run for run in setting.runs if run.seed in seeds] for setting in (one, other))
    tables = cells(ours, quantity, beside=theirs), cells(theirs, quantity, beside=ours)
    if tables[0] is None or tables[1] is None:
        return None
    return crossed_interval(tables[0] - tables[1]), seeds


def _column(run: Run, key: str) -> numpy.ndarray | None:
    """Float `[prompts]` with NaN for prompts without the number; None if no prompt has it."""
    if key.startswith("win_rate/llm/"):
        # A reply without a verdict has no winner.
        winners = [row.get(key.removeprefix("win_rate/"), {}).get("winner") for row in run.rows]
        column = [None if winner is None else {"policy": 1.0, "tie": 0.5}.get(winner, 0.0) for winner in winners]
    elif key.startswith("win_rate/"):
        column = _wins(run, key)
    else:
        column = [row.get(key) for row in run.rows]
    known = numpy.array([math.nan if value is None else value for value in column], dtype=numpy.float64)
    return None if numpy.isnan(known).all() else known


def _wins(run: Run, key: str) -> list[float | None]:
    """1, 0 or 1/2 of each prompt, as evaluate counts them; all None if a prompt lacks a score."""
    _, kind, players = key.split("/")
    one, other = players.split("_vs_")
    needed = (f"{kind}/{one}", f"{kind}/{other}")
    if any(name not in row for row in run.answered for name in needed):
        return [None] * len(run.rows)
    ties = [row.get(one) is not None and row.get(one) == row.get(other) for row in run.answered]
    won = iter(wins(*([row[name] for row in run.answered] for name in needed), ties=ties))
    return [next(won) if row else None for row in run.rows]


def _shared_prompts(runs: Sequence[Run], key: str) -> numpy.ndarray:
    """Bool `[prompts]`: which prompts have the number in all runs. Verdicts alone may be missing here and there."""
    present = numpy.array([~numpy.isnan(_column(run, key)) for run in runs])
    if not key.startswith("win_rate/llm/") and (present != present[0]).any():
        raise ConfigError(f"{', '.join(str(run.folder) for run in runs)}: have {key} for different prompts")
    return present.all(axis=0)


def _table(runs: Sequence[Run], key: str) -> numpy.ndarray:
    """Float `[runs, prompts]`, NaN where there is no number."""
    table = numpy.array([_column(run, key) for run in runs])
    for run, column in zip(runs, table, strict=True):
        mean, written = float(numpy.nanmean(column)), run.means.get(key)
        if written is not None and abs(written - mean) > 1e-6 * max(1.0, abs(written)):
            raise ConfigError(
                f"{run.folder}/evaluation.json: its rows have the mean {mean} of {key}, its metrics say {written}"
            )
    return table
