"""The reward stage's metrics, by hand."""

import pytest
import torch

from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.stages.reward.stage import RewardStage


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_identical_pairs_are_half_right_however_their_rewards_are_rounded(shared_prefix):
    stage = RewardStage.__new__(RewardStage)
    stage._centering = 0.0
    responses = [((5, 6), (5, 6)), ((5, 6), (5, 7)), ((5, 6), (5, 7)), ((5, 6), (5, 7))]
    groups = [Group(prompt=(1, 2), responses=pair, values={"margin": (0.0,)}) for pair in responses]
    batch = pack_groups(groups, shared_prefix=shared_prefix)
    rewards = torch.tensor([1.0, 1.0 - 1e-7, 1.0, 1.0 - 1e-7, 0.0, 1.0, 2.0, 2.0], requires_grad=True)
    total, count = stage.loss(rewards, batch).means["accuracy"]
    assert (total.item(), count) == (0.5 + 1.0 + 0.0 + 0.5, 4)
