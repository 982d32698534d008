"""A model that only scores is found by all ranks, or by none."""

from types import SimpleNamespace

import pytest

from megatron_brain.errors import AgreedError
from megatron_brain.training.frozen import FrozenModel


def test_a_checkpoint_that_one_rank_cannot_see_stops_all_ranks_with_one_message(tmp_path):
    told = []

    def gather(mine):
        told.append(mine)
        return [None, mine]

    run = SimpleNamespace(config=None, parallel=SimpleNamespace(gather_over_world=gather, world_size=2), in_use=set())
    with pytest.raises(AgreedError, match=r"checkpoint folder .*reward does not exist.*\(rank 1 alone\)"):
        FrozenModel(run, "reward", str(tmp_path / "reward"), head="reward")
    assert len(told) == 1


def test_a_model_that_is_not_given_is_looked_for_nowhere():
    assert FrozenModel(SimpleNamespace(), "reward", None, head="reward").path is None
