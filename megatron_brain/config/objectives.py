"""What the configuration knows of each objective: `megatron_brain.objectives` has the objectives themselves."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ObjectiveTraits:
    """What settings have to fit, known without torch. All of it follows from the objective's class."""

    settings: tuple[str, ...]
    """Settings of the brain stage that the constructor takes, by name."""
    group_multiple: int = 1
    """The number of a group's responses is a multiple of this."""
    needs_log_proposal: bool = True
    """Whether the loss uses the probability that a response was drawn with."""


_PAIRS = ObjectiveTraits(settings=("policy_strength",), group_multiple=2, needs_log_proposal=False)
_RATIOS = ObjectiveTraits(settings=("kl_coefficient", "clip_ratio"))

OBJECTIVE_TRAITS: dict[str, ObjectiveTraits] = {
    "brain": ObjectiveTraits(settings=("baseline", "alpha", "policy_strength", "reward_temperature")),
    "dpo": _PAIRS,
    "ipo": _PAIRS,
    "rso-hinge": _PAIRS,
    "rso-sigmoid": _PAIRS,
    "rloo": _RATIOS,
    "grpo": _RATIOS,
}
"""The traits by the name that `--objective` takes."""
