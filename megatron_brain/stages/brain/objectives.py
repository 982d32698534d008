"""Makes the objective of a run, and registers objectives from outside the package."""

import inspect

from megatron_brain.config.fields import stage_fields
from megatron_brain.config.objectives import OBJECTIVE_TRAITS, ObjectiveTraits
from megatron_brain.config.run import RunConfig
from megatron_brain.objectives.objective import Objective
from megatron_brain.objectives.registry import OBJECTIVES, make_objective


def objective_of(config: RunConfig) -> Objective:
    """The objective that a run's settings ask for."""
    name, fields = config.brain.objective, stage_fields("brain")
    settings = {
        setting: getattr(config.section(fields[setting].section), setting)
        for setting in OBJECTIVE_TRAITS[name].settings
    }
    return make_objective(name, settings)


def register_objective(name: str, kind: type[Objective]) -> None:
    """Make an objective known to `--objective`, its checks, the brain stage and rollout files.

    Args:
        name: what `--objective` takes.
        kind: its class. The constructor takes settings of the brain stage by name, or nothing.
    """
    assert name not in OBJECTIVES, f"there are two objectives called {name}"
    OBJECTIVES[name], OBJECTIVE_TRAITS[name] = kind, traits_of(kind)


def traits_of(kind: type[Objective]) -> ObjectiveTraits:
    """What the configuration has to know of an objective's class."""
    settings = tuple(inspect.signature(kind).parameters)
    unknown = set(settings) - stage_fields("brain").keys()
    assert not unknown, f"{kind.__name__} takes {sorted(unknown)}, which are no settings of the brain stage"
    return ObjectiveTraits(
        settings=settings, group_multiple=kind.group_multiple, needs_log_proposal="log_proposal" in kind.needs
    )
