"""The evaluation report by hand."""

import pytest

from megatron_brain.stages.comparison import require_finite
from megatron_brain.stages.evaluate.stage import summarize

ROWS = [
    {"prompt": "a", "reward/policy": 2.0, "reward/baseline": 1.0, "reward/reference": 3.0, "kl_to_prior": 0.5},
    {"prompt": "b", "reward/policy": 1.0, "reward/baseline": 1.0, "reward/reference": 0.0, "kl_to_prior": 1.5},
    {"prompt": "c", "reward/policy": 0.0, "reward/baseline": -1.0, "reward/reference": 0.5, "kl_to_prior": -0.5},
    {"prompt": "d", "reward/policy": 1.0, "reward/baseline": 2.0, "reward/reference": 0.0, "kl_to_prior": 0.5},
]


def values(rows):
    return {name: estimate.value for name, estimate in summarize(rows, bootstrap_samples=50, seed=0).items()}


def test_means_and_win_rates_by_hand():
    assert values(ROWS) == {
        "reward/policy": 1.0,
        "reward/baseline": 0.75,
        "reward/reference": 0.875,
        "kl_to_prior": 0.5,
        "win_rate/reward/policy_vs_baseline": (1 + 0.5 + 1 + 0) / 4,
        "win_rate/reward/policy_vs_reference": (0 + 1 + 0 + 1) / 4,
        "win_rate/reward/baseline_vs_reference": (0 + 1 + 0 + 1) / 4,
    }


def test_an_answer_some_prompts_lack_is_left_out_and_not_averaged_over_fewer():
    rows = [dict(row) for row in ROWS]
    del rows[2]["reward/reference"]
    found = values(rows)
    assert "reward/reference" not in found
    assert [name for name in found if name.startswith("win_rate")] == ["win_rate/reward/policy_vs_baseline"]


def test_judge_and_reward_have_win_rates_of_their_own():
    rows = [row | {"judge/policy": 0.0, "judge/baseline": 1.0} for row in ROWS]
    found = values(rows)
    assert found["win_rate/judge/policy_vs_baseline"] == 0.0
    assert found["win_rate/reward/policy_vs_baseline"] == 0.625


def test_intervals_hold_the_value_and_follow_from_the_seed():
    first = summarize(ROWS, bootstrap_samples=200, seed=0)
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in first.values())
    assert summarize(ROWS, bootstrap_samples=200, seed=0) == first
    assert summarize(ROWS, bootstrap_samples=200, seed=1) != first


def test_equal_answers_tie_whatever_their_scores_and_others_do_not():
    rows = [
        {"policy": "yes", "baseline": "yes", "reward/policy": 1.0, "reward/baseline": 1.0 + 1e-7},
        {"policy": "yes", "baseline": "no", "reward/policy": 1.0 + 1e-7, "reward/baseline": 1.0},
    ]
    assert values(rows)["win_rate/reward/policy_vs_baseline"] == 0.75
    assert values(rows[:1])["win_rate/reward/policy_vs_baseline"] == 0.5


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_never_averaged_but_named_with_its_record(number):
    rows = [{"id": "d.jsonl:1", "kl_to_prior": 0.5}, {"id": "d.jsonl:2", "kl_to_prior": number}]
    with pytest.raises(FloatingPointError, match=f"kl_to_prior of d.jsonl:2 is {number}"):
        require_finite(rows)
    require_finite(rows[:1])
