"""All numbers of a report: the quantities of every setting, and the differences between settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_brain.errors import ConfigError
from megatron_brain.stages.intervals import Estimate
from reports.quantities import Quantity, difference, estimate, known
from reports.runs import Setting


@dataclass(frozen=True)
class Difference:
    """A quantity of one setting minus that of another, over the seeds and prompts that both have."""

    one: str
    other: str
    quantity: Quantity
    estimate: Estimate
    seeds: tuple[int, ...]

    @property
    def words(self) -> str:
        """What the interval shows."""
        low, high = self.estimate.low, self.estimate.high
        if low <= 0 <= high:
            return "no difference shown: the interval contains 0"
        larger, smaller = (self.one, self.other) if low > 0 else (self.other, self.one)
        limits = "" if len(self.seeds) > 1 else "; one seed, so it may not hold for another"
        return f"the interval excludes 0: larger for {larger} than for {smaller}{limits}"


@dataclass(frozen=True)
class Findings:
    """The numbers of a report."""

    settings: list[Setting]
    main: list[Quantity]
    posterior: list[Quantity]
    estimates: dict[tuple[str, str], Estimate]
    """By the name of the setting and the key of the quantity."""
    differences: list[Difference]
    notes: list[str]
    """Sentences about what is missing or must be kept in mind."""


def find(settings: list[Setting], baseline: Setting | None) -> Findings:
    """All numbers, with the differences of each setting from the baseline, or of all pairs without one.

    Raises:
        ConfigError: runs that should have the same prompts have others, or a file contradicts itself.
    """
    main, posterior, notes = known(settings)
    estimates = {}
    for setting in settings:
        for quantity in (*main, *posterior):
            found = estimate(setting, quantity)
            if found is not None:
                estimates[setting.name, quantity.key] = found
    if baseline is None:
        pairs = list(combinations(settings, 2))
    else:
        pairs = [(setting, baseline) for setting in settings if setting is not baseline]
    differences = []
    for one, other in pairs:
        if set(one.seeds) != set(other.seeds):
            both = sorted({*one.seeds} & {*other.seeds})
            notes.append(
                f"{one.name} has the seeds {_listed(one.seeds)}, {other.name} {_listed(other.seeds)}: "
                + (f"they are compared by {_listed(both)}" if both else "they are not compared")
            )
        for quantity in (*main, *posterior):
            found = difference(one, other, quantity) if quantity.of_policy else None
            if found is not None:
                differences.append(Difference(one.name, other.name, quantity, *found))
    return Findings(settings, main, posterior, estimates, differences, [*notes, *_of_seeds(settings)])


def find_baseline(settings: Sequence[Setting], name: str | None) -> Setting | None:
    """The setting of --baseline-setting, by the name of its folder, with or without its experiment, or by its label."""
    if name is None:
        return None
    found = [each for each in settings if name in (each.name, each.place, each.runs[0].setting, each.runs[0].label)]
    if len(found) != 1:
        several = "several settings have this name" if found else "no setting has this name"
        places = ", ".join(setting.place for setting in found or settings)
        raise ConfigError(f"--baseline-setting {name}: {several}; give one of {places}")
    return found[0]


def _of_seeds(settings: Sequence[Setting]) -> list[str]:
    notes = [
        f"{setting.name} has one seed: its intervals are over prompts alone and say nothing of another seed"
        for setting in settings
        if len(setting.runs) == 1
    ]
    versions = {tuple(sorted(run.versions.items())) for setting in settings for run in setting.runs}
    if len(versions) > 1:
        differing = sorted({name for pairs in versions for name, _ in pairs if len(_values(versions, name)) > 1})
        notes.append(f"the runs were made with different versions of {', '.join(differing)}")
    return notes


def _values(versions: set[tuple[tuple[str, str], ...]], name: str) -> set[str | None]:
    return {dict(pairs).get(name) for pairs in versions}


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"
