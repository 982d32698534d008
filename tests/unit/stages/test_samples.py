"""Stages over a fixed list of samples: length of the run, its steps and the guard of resuming."""

from types import SimpleNamespace

import pytest

from megatron_brain.config.run import RunConfig
from megatron_brain.data.group_schedule import GroupDoesNotFitError
from megatron_brain.data.groups import Group
from megatron_brain.errors import AgreedError, ConfigError
from megatron_brain.stages.dataset_stage import DatasetStage
from megatron_brain.training.trainer import Trainer

SAMPLES = [[Group(prompt=(1,), responses=((i,),)), Group(prompt=(2,), responses=((i,),))] for i in range(10)]


def stage(num_samples=10, warmup=0, **training):
    config = RunConfig(stage="sft")
    config.optimizer.lr_warmup_iters = warmup
    for name, value in {"global_batch_size": 4, "micro_batch_size": 2, **training}.items():
        setattr(config.training, name, value)
    return DatasetStage(SimpleNamespace(config=config, corpora={}), SAMPLES[:num_samples], []), config


def trainer(config, iteration, dp_rank=0, dp_size=1):
    return SimpleNamespace(
        config=config, iteration=iteration, parallel=SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size)
    )


@pytest.mark.parametrize(
    ("training", "expected"),
    [({}, 3), ({"train_epochs": 2.0}, 5), ({"train_epochs": 0.1}, 1), ({"train_iters": 7}, 7)],
)
def test_epochs_are_rounded_up_to_whole_steps(training, expected):
    assert stage(**training)[0].train_iters == expected


def test_a_micro_batch_holds_all_groups_of_its_samples():
    built, config = stage()
    micro_batches = built.micro_batches(trainer(config, 0))
    assert [len(groups) for groups in micro_batches] == [4, 4]
    assert all(a.responses == b.responses for groups in micro_batches for a, b in zip(*[iter(groups)] * 2, strict=True))


def test_replicas_together_take_the_samples_of_one_process():
    built, config = stage()
    for iteration in range(4):
        whole = built.micro_batches(trainer(config, iteration))
        halves = [built.micro_batches(trainer(config, iteration, rank, 2)) for rank in range(2)]
        assert [half[0] for half in halves] == whole


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_token_budget_packs_the_same_samples_into_micro_batches_it_holds(replicas):
    built, config = stage(micro_batch_size=1, max_tokens_per_micro_batch=5)
    config.parallel.tensor_model_parallel_size = 1
    for iteration in range(4):
        whole = [group for groups in stage()[0].micro_batches(trainer(stage()[1], iteration)) for group in groups]
        everyone = []
        for rank in range(replicas):
            at = trainer(config, iteration, rank, replicas)
            at.parallel.tp_size = at.parallel.pp_size = 1
            everyone.append(built.micro_batches(at))
        assert len({len(mine) for mine in everyone}) == 1
        batches = [groups for mine in everyone for groups in mine]
        assert all(sum(group.num_tokens(shared_prefix=True) for group in groups) <= 5 for groups in batches)
        taken = [group for groups in batches for group in groups]
        assert sorted(map(repr, taken)) == sorted(map(repr, whole))


def test_a_pair_is_never_cut():
    built, config = stage(micro_batch_size=1, max_tokens_per_micro_batch=3)
    built._train = [[Group(prompt=(1, 2), responses=((3,), (4,)), record_id="pairs:7")]] * 10
    at = trainer(config, 0)
    at.parallel.tp_size = at.parallel.pp_size = 1
    with pytest.raises(GroupDoesNotFitError, match="pairs:7"):
        built.micro_batches(at)


def test_a_warm_up_longer_than_the_run_is_refused_with_the_numbers():
    made, config = stage(warmup=3)
    with pytest.raises(ConfigError, match="lr_warmup_iters=3 must be less than the run's 3 iterations"):
        Trainer(SimpleNamespace(config=config, parallel=None), made)


def test_resuming_with_other_data_is_refused():
    state = stage()[0].state_dict()
    stage()[0].load_state_dict(state, [])
    with pytest.raises(AgreedError, match="num_samples was 10, is now 9"):
        stage(num_samples=9)[0].load_state_dict(state, [])


def test_no_validation_samples_give_no_metrics():
    built, config = stage()
    assert built.validate(trainer(config, 0)) == {}
