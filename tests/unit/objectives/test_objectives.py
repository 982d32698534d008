"""What holds for every objective of the registry."""

import pytest
import torch
from helpers.random_groups import doubles, random_group

from megatron_brain.config.objectives import OBJECTIVE_TRAITS
from megatron_brain.errors import UserError
from megatron_brain.objectives.registry import OBJECTIVES, make_objective
from megatron_brain.stages.brain.objectives import traits_of

SETTINGS = {
    "baseline": "self-normalized",
    "alpha": "soft",
    "policy_strength": 0.4,
    "reward_temperature": 0.7,
    "kl_coefficient": 0.3,
    "clip_ratio": 0.5,
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def objective(name, **settings):
    values = SETTINGS | settings
    return make_objective(name, {key: values[key] for key in OBJECTIVE_TRAITS[name].settings})


def group_of(made, n=6, seed=0, spread=0.5):
    """log q_theta and what the objective knows of a group whose ratios lie around 1, so that some are clipped."""
    log_policy, noise, other_noise, rewards = random_group(n, seed)
    known = {
        "log_prior": log_policy + spread * (noise + 10),
        "reward": rewards,
        "log_proposal": log_policy + spread * (other_noise + 10),
    }
    known = {key: known[key] for key in made.needs}
    return log_policy, known | {made.fixes: made.fix(known)}


@every_objective
@pytest.mark.parametrize("seed", range(4))
class TestGradient:
    def test_in_closed_form_is_that_of_autograd(self, name, seed):
        made = objective(name)
        log_policy, known = group_of(made, seed=seed)
        leaf = log_policy.clone().requires_grad_()
        [expected] = torch.autograd.grad(made.loss(leaf, known), leaf)
        closed = made.gradient(leaf, known)
        assert expected.abs().max() > 1e-3 and not closed.requires_grad
        torch.testing.assert_close(closed, expected, rtol=1e-12, atol=1e-14)

    def test_in_closed_form_is_that_of_finite_differences(self, name, seed):
        made = objective(name)
        log_policy, known = group_of(made, seed=seed)
        steps = 1e-6 * torch.eye(len(log_policy), dtype=torch.float64)
        numeric = [(made.loss(log_policy + s, known) - made.loss(log_policy - s, known)) / 2e-6 for s in steps]
        torch.testing.assert_close(made.gradient(log_policy, known), torch.stack(numeric), rtol=1e-7, atol=1e-8)


@every_objective
def test_the_gradient_reaches_the_policy_alone(name):
    made = objective(name)
    log_policy, known = group_of(made)
    known = {key: value.clone().requires_grad_() for key, value in known.items()}
    loss = made.loss(log_policy.requires_grad_(), {key: value.detach() for key, value in known.items()})
    loss.backward()
    assert log_policy.grad is not None and made.fix(known).shape == log_policy.shape


@every_objective
def test_the_declared_metrics_are_measured(name):
    made = objective(name)
    measured = made.measure(*group_of(made))
    assert sorted(measured) == sorted((*made.mean_metrics, *made.max_metrics))
    assert all(value.shape == () and value.isfinite() for value in measured.values())


@every_objective
def test_the_host_never_waits_for_values_on_the_device(name):
    # Meta tensors have no values: a look at one would raise.
    made = objective(name)
    known = dict.fromkeys((*made.needs, made.fixes), torch.zeros(4, device="meta"))
    log_policy = torch.zeros(4, device="meta")
    assert made.loss(log_policy, known).is_meta and made.gradient(log_policy, known).is_meta
    assert all(value.is_meta for value in made.measure(log_policy, known).values())


@every_objective
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(name):
    made = objective(name)
    _, known = group_of(made)
    shifted = {key: known[key] + (3.0 if key == "reward" else 0.0) for key in made.needs}
    torch.testing.assert_close(made.fix(shifted), known[made.fixes], rtol=1e-9, atol=1e-12)


@every_objective
def test_what_is_claimed_of_a_refreshed_proposal_holds_there_and_only_there(name):
    made = objective(name)
    if (check := made.refresh_check) is None:
        assert "log_proposal" not in made.needs
        return
    assert check.metric in made.max_metrics
    log_policy, known = group_of(made)
    assert made.measure(log_policy, known)[check.metric] > 0.01
    assert made.measure(log_policy, known | {"log_proposal": log_policy})[check.metric] < 1e-15


@every_objective
@pytest.mark.parametrize("count", [0, 1])
def test_groups_that_are_too_small_are_refused(name, count):
    made = objective(name)
    with pytest.raises(AssertionError, match="at least two samples|even number of responses"):
        made.fix(dict.fromkeys(made.needs, torch.zeros(count)))


@every_objective
def test_a_reward_that_is_no_number_is_refused(name):
    made = objective(name)
    known = {key: doubles(-1, -2) for key in made.needs} | {"reward": doubles(1, torch.nan)}
    with pytest.raises(UserError, match="nan"):
        made.fix(known)


def test_the_configuration_knows_the_objectives_and_what_follows_from_their_classes():
    assert list(OBJECTIVE_TRAITS) == list(OBJECTIVES)
    for name, kind in OBJECTIVES.items():
        assert OBJECTIVE_TRAITS[name] == traits_of(kind)
        assert "reward" in kind.needs, "the stage reports it"
