"""The objectives by the name that `--objective` takes."""

from collections.abc import Mapping

from megatron_brain.objectives.brain import Brain
from megatron_brain.objectives.dpo import DPO
from megatron_brain.objectives.grpo import GRPO
from megatron_brain.objectives.ipo import IPO
from megatron_brain.objectives.objective import Objective
from megatron_brain.objectives.rloo import RLOO
from megatron_brain.objectives.rso_hinge import RSOHinge

OBJECTIVES: dict[str, type[Objective]] = {
    "brain": Brain,
    "dpo": DPO,
    "ipo": IPO,
    "rso-hinge": RSOHinge,
    "rso-sigmoid": DPO,  # RSO's gamma is DPO's beta.
    "rloo": RLOO,
    "grpo": GRPO,
}


def make_objective(name: str, settings: Mapping[str, object]) -> Objective:
    """The objective with this name.

    Args:
        settings: what its constructor takes, by name.
    """
    return OBJECTIVES[name](**settings)
