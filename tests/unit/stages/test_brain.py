"""What the brain stage checks of itself."""

from types import SimpleNamespace

import pytest

from megatron_brain.config.run import RunConfig
from megatron_brain.errors import ConfigError
from megatron_brain.objectives.brain import Brain
from megatron_brain.objectives.dpo import DPO
from megatron_brain.objectives.rloo import RLOO
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.stages.rewards.scale import Scale


def stage(*, proposal_is_policy: bool = True, objective: type = Brain) -> SimpleNamespace:
    return SimpleNamespace(
        steps_per_round=4,
        _refresh_check=objective.refresh_check,
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


def test_every_objective_makes_the_check_that_is_its_own():
    trainer = SimpleNamespace(iteration=0)
    with pytest.raises(RuntimeError, match="every ratio of policy and proposal is 1, but the largest"):
        BrainStage.before_update(stage(objective=RLOO), trainer, {"ratio_error_at_refresh": 0.5})
    BrainStage.before_update(stage(objective=DPO), trainer, {})


@pytest.mark.parametrize(("objective", "logged"), [(Brain, "beta_error_at_refresh"), (RLOO, "ratio_error_at_refresh")])
def test_what_is_checked_is_logged_once_a_round(objective, logged):
    metrics = {"loss": 1.0, logged: 0.25}
    made = stage(objective=objective)
    made._round = SimpleNamespace(number=3, metrics={"seconds_scoring": 2.0}, texts=list)
    first = dict(metrics)
    assert BrainStage.after_step(made, SimpleNamespace(iteration=13), first) == {"round": 3, "seconds_scoring": 2.0}
    later = dict(metrics)
    assert BrainStage.after_step(made, SimpleNamespace(iteration=14), later) == {}
    assert (first, later) == (metrics, {"loss": 1.0})


def test_a_run_does_not_resume_with_another_objective_than_its_round_was_made_for():
    made = SimpleNamespace(_fixed=dict, _corpora={}, _config=RunConfig(stage="brain"), _round="unset", _held_out=None)
    made._maker = SimpleNamespace(prior=None, reward_scale=Scale())
    state = {"prior": None, "round": 0}
    with pytest.raises(ConfigError, match="made for dpo. Resume with --objective dpo, or start anew"):
        BrainStage.load_state_dict(made, {**state, "objective": "dpo"}, [])
    # Checkpoints of before there was a choice are BRAIn's.
    BrainStage.load_state_dict(made, state, [])
    assert made._round is None


def test_the_metrics_of_a_run_are_those_of_its_objective_and_its_responses():
    config = RunConfig(stage="brain")
    assert "ess_alpha" in BrainStage.metric_names(config) and "distinct_candidates" not in BrainStage.metric_names(
        config
    )
    config.brain.objective, config.brain.responses = "rso-hinge", "rso"
    names = BrainStage.metric_names(config)
    assert {"pair_accuracy", "distinct_candidates"} < set(names) and "ess_alpha" not in names
