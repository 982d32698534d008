"""Which settings of the brain section each objective reads. The objectives are in `megatron_brain.objectives`."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megatron_brain.config.stages import BrainConfig

Objective = Literal["brain", "dpo", "ipo", "rso-hinge", "rso-sigmoid", "rloo", "grpo"]

OBJECTIVE_SETTINGS: dict[str, tuple[str, ...]] = {
    "brain": ("baseline", "alpha", "policy_strength", "reward_temperature"),
    "dpo": ("policy_strength",),
    "ipo": ("policy_strength",),
    "rso-hinge": ("policy_strength",),
    "rso-sigmoid": ("policy_strength",),
    "rloo": ("kl_coefficient", "clip_ratio"),
    "grpo": ("kl_coefficient", "clip_ratio"),
}
"""Fields of `BrainConfig` that the objective's constructor takes."""

PAIRWISE = ("dpo", "ipo", "rso-hinge", "rso-sigmoid")
"""Objectives on pairs, which do not use the probability of drawing a response."""


def objective_settings(brain: "BrainConfig") -> dict[str, object]:
    """The arguments for the constructor of a run's objective, by name."""
    return {name: getattr(brain, name) for name in OBJECTIVE_SETTINGS[brain.objective]}
