"""Zero and unit of reward models, by hand."""

import json
import random

import pytest

from megatron_brain.stages.rewards.scale import Scale


def scale_of(*rewards):
    scale = Scale()
    scale.measure("rm", rewards)
    return scale


def test_the_unit_is_the_deviation_within_prompts_and_the_zero_the_mean_of_all():
    # Squares around the prompts' means 2 and 11: 1 + 1 + 1 + 0 + 1 = 4, degrees of freedom 1 + 2; mean of all 37 / 5.
    scale = scale_of([1.0, 3.0], [10.0, 11.0, 12.0])
    assert scale.standardised("rm", 8.4) == pytest.approx((8.4 - 7.4) / (4 / 3) ** 0.5, rel=1e-15)


def test_a_constant_of_a_prompt_and_another_unit_change_no_difference_between_its_responses():
    groups = [[0.3, -1.0, 0.7], [2.0, 2.5], [0.1, 0.2, 0.9, -0.4]]
    moved = [[7 * reward + shift for reward in group] for group, shift in zip(groups, (100.0, -3.0, 0.0), strict=True)]
    one, other = scale_of(*groups), scale_of(*moved)
    for group, again in zip(groups, moved, strict=True):
        differences = [
            [scale.standardised("rm", reward) - scale.standardised("rm", rewards[0]) for reward in rewards]
            for scale, rewards in ((one, group), (other, again))
        ]
        assert differences[1] == pytest.approx(differences[0], abs=1e-12)


def test_the_order_in_which_replicas_report_changes_no_bit():
    draw = random.Random(1)
    groups = [[draw.gauss(0, 10**place) for _ in range(4)] for place in range(6)]
    expected = scale_of(*groups).state_dict()
    for _ in range(20):
        draw.shuffle(groups)
        assert scale_of(*groups).state_dict() == expected


def test_a_model_that_cannot_tell_responses_apart_counts_0_until_it_can():
    scale = scale_of([0.5, 0.5], [2.0, 2.0])
    assert scale.lacks("rm") and scale.standardised("rm", 9.0) == 0.0
    scale.measure("rm", [[1.0, 3.0]])
    assert not scale.lacks("rm") and scale.standardised("rm", 9.0) == pytest.approx(7 / 2**0.5)


def test_single_responses_are_measured_against_each_other():
    assert scale_of([1.0], [3.0], []).state_dict() == {"rm": [2.0, pytest.approx(2**0.5)]}
    assert scale_of([1.0]).lacks("rm") and scale_of().lacks("rm")


def test_a_resumed_run_goes_on_with_the_same_scale():
    again = Scale()
    again.load_state_dict(json.loads(json.dumps(scale_of([1.0, 3.3], [0.1, 0.7]).state_dict())))
    assert again.standardised("rm", 0.123) == scale_of([1.0, 3.3], [0.1, 0.7]).standardised("rm", 0.123)
