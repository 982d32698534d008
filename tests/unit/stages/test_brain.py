"""What the brain stage checks of itself."""

from types import SimpleNamespace

import pytest

from megatron_brain.config.run import RunConfig
from megatron_brain.stages.brain.stage import BrainStage


def stage(*, proposal_is_policy: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        steps_per_round=4,
        _config=RunConfig(stage="brain"),
        _maker=SimpleNamespace(proposal_is_policy=lambda number: proposal_is_policy),
    )


@pytest.mark.parametrize("iteration", [0, 8])
def test_the_first_step_of_a_round_stops_where_beta_is_not_one_over_n(iteration):
    trainer = SimpleNamespace(iteration=iteration)
    BrainStage.before_update(stage(), trainer, {"beta_error_at_refresh": 0.9e-4})
    with pytest.raises(RuntimeError, match="largest difference is 0.0011"):
        BrainStage.before_update(stage(), trainer, {"beta_error_at_refresh": 1.1e-3})


def test_beta_may_be_anything_later_in_a_round_or_when_the_proposal_is_another():
    BrainStage.before_update(stage(), SimpleNamespace(iteration=1), {"beta_error_at_refresh": 0.5})
    BrainStage.before_update(
        stage(proposal_is_policy=False), SimpleNamespace(iteration=0), {"beta_error_at_refresh": 0.5}
    )
