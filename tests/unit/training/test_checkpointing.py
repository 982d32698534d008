"""Checkpoints of one process: what is saved is loaded, and what does not fit is refused."""

import dataclasses
import json
import random

import numpy
import pytest
import torch
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.models.architecture import architecture, resolve
from megatron_brain.models.provider import build_model
from megatron_brain.training.checkpointing import (
    INFO,
    LATEST,
    has_checkpoint,
    load_training_state,
    load_weights,
    read_info,
    save_checkpoint,
)
from megatron_brain.training.optimizer import build_optimizer, wrap_for_training
from megatron_brain.training.report import LossOutput
from megatron_brain.training.schedule import forward_backward

BATCHES = [pack_groups([Group(prompt=(1, 2, 3), responses=((4, 5), (6, 7, 8)))], shared_prefix=True)]


class FakeTokenizer:
    def save(self, directory):
        directory.mkdir()
        (directory / "tokenizer.txt").write_text("a tokenizer")


class Training:
    """A tiny model with its optimizer and schedule."""

    def __init__(self, parallel, *, seed=1, head="policy", bf16=False, lr=1e-2, **sizes):
        model = resolve(ModelConfig(bf16=bf16, **SIZES | {"num_layers": 2} | sizes), None, "the test")
        self.config = RunConfig(stage="sft", model=model)
        self.config.optimizer.lr = lr
        self.parallel, self.head = parallel, head
        self.chunks = build_model(model, self.config.parallel, parallel, head=head, seed=seed)
        self.wrapped = wrap_for_training(self.chunks, self.config, parallel)
        self.optimizer, self.scheduler = build_optimizer(self.wrapped, self.config, 10)

    def step(self):
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_backward(self.wrapped, BATCHES, lambda o, b: LossOutput(loss_sum=-o.sum(), count=5), self.parallel)
        self.optimizer.step()
        self.scheduler.step(increment=1)

    def save(self, root, iteration, *, with_optimizer=True, **options):
        optimizer = {"optimizer": self.optimizer, "scheduler": self.scheduler} if with_optimizer else {}
        return save_checkpoint(
            root,
            iteration,
            chunks=self.chunks,
            head=self.head,
            config=self.config,
            tokenizer=FakeTokenizer(),
            parallel=self.parallel,
            **optimizer,
            **options,
        )

    def resume(self, info):
        load_training_state(
            info, self.chunks, parallel=self.parallel, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.chunks[0].named_parameters()}


def equal_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_goes_on_exactly_as_one_that_never_stopped(single, tmp_path, bf16):
    whole = Training(single, bf16=bf16)
    for _ in range(2):
        whole.step()
    whole.save(tmp_path, 2)
    resumed = Training(single, seed=99, bf16=bf16)
    assert not equal_weights(resumed.weights(), whole.weights())
    resumed.resume(read_info(tmp_path))
    assert equal_weights(resumed.weights(), whole.weights())
    for training in (whole, resumed):
        for _ in range(2):
            training.step()
    assert equal_weights(resumed.weights(), whole.weights())
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] < 1e-2


def test_a_resumed_run_follows_its_own_learning_rate(single, tmp_path):
    whole = Training(single)
    whole.step()
    whole.save(tmp_path, 1)
    resumed, fresh = Training(single, lr=1e-3), Training(single, lr=1e-3)
    resumed.resume(read_info(tmp_path))
    for training in (resumed, fresh):
        training.step()
    # One step behind the resumed run, the fresh one is at the learning rate of its own second step.
    fresh.step()
    resumed_rate, fresh_rate = (t.optimizer.param_groups[0]["lr"] for t in (resumed, fresh))
    assert resumed_rate == fresh_rate < 1e-3


def test_resuming_without_the_saved_optimizer_state_would_differ(single, tmp_path):
    """The test above sees more than the weights."""
    whole = Training(single)
    whole.step()
    whole.save(tmp_path, 1)
    weights_only = Training(single)
    load_weights(read_info(tmp_path), weights_only.chunks, head="policy")
    for training in (whole, weights_only):
        training.step()
    assert not equal_weights(weights_only.weights(), whole.weights())


def test_random_generators_go_on_where_they_were(single, tmp_path):
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    training = Training(single)
    training.step()
    training.save(tmp_path, 1)
    drawn = draw()
    assert draw() != drawn
    training.resume(read_info(tmp_path))
    assert draw() == drawn


def test_a_checkpoint_says_what_it_is(single, tmp_path):
    training = Training(single, head="reward")
    path = training.save(tmp_path, 100, with_optimizer=False, stage_state={"num_samples": 7})
    assert path == tmp_path / "iter_0000100"
    assert (tmp_path / LATEST).read_text() == "100"
    info = read_info(tmp_path)
    assert info == read_info(path)
    assert (info.iteration, info.head, info.stage_state) == (100, "reward", {"num_samples": 7})
    assert (info.has_optimizer, info.bf16, info.architecture) == (False, False, architecture(training.config.model))
    assert info.layout == {"pipeline": 1, "tensor": 1, "data": 1}
    assert (info.tokenizer_dir / "tokenizer.txt").is_file()
    assert (path / "config.yaml").is_file()
    assert has_checkpoint(tmp_path) and not has_checkpoint(path)


def test_the_latest_checkpoint_is_taken_and_earlier_ones_stay_readable(single, tmp_path):
    training = Training(single)
    training.save(tmp_path, 1, with_optimizer=False)
    first = training.weights()
    training.step()
    training.save(tmp_path, 2, with_optimizer=False)
    assert read_info(tmp_path).iteration == 2
    loaded = Training(single, seed=5)
    load_weights(read_info(tmp_path / "iter_0000001"), loaded.chunks, head="policy")
    assert equal_weights(loaded.weights(), first)


def test_saving_an_iteration_again_replaces_it(single, tmp_path):
    training = Training(single)
    training.save(tmp_path, 1, with_optimizer=False)
    training.step()
    training.save(tmp_path, 1, with_optimizer=False)
    loaded = Training(single, seed=5)
    load_weights(read_info(tmp_path), loaded.chunks, head="policy")
    assert equal_weights(loaded.weights(), training.weights())


@pytest.mark.parametrize("untied", [False, True])
def test_a_reward_model_starts_from_a_policys_trunk_with_its_own_head(single, tmp_path, untied):
    policy = Training(single, untie_embeddings_and_output_weights=untied)
    policy.save(tmp_path, 1)
    reward = Training(single, seed=5, head="reward", untie_embeddings_and_output_weights=untied)
    head = reward.weights()["reward_head.weight"]
    load_weights(read_info(tmp_path), reward.chunks, head="reward")
    loaded = reward.weights()
    assert torch.equal(loaded.pop("reward_head.weight"), head)
    trunk = {name: weight for name, weight in policy.weights().items() if name != "output_layer.weight"}
    assert equal_weights(loaded, trunk)


def test_a_reward_checkpoint_brings_its_head(single, tmp_path):
    saved = Training(single, head="reward")
    saved.save(tmp_path, 1, with_optimizer=False)
    loaded = Training(single, seed=5, head="reward")
    load_weights(read_info(tmp_path), loaded.chunks, head="reward")
    assert equal_weights(loaded.weights(), saved.weights())


def test_a_policy_is_not_made_from_a_reward_model(single, tmp_path):
    training = Training(single, head="reward")
    training.save(tmp_path, 1, with_optimizer=False)
    policy = Training(single)
    before = policy.weights()
    with pytest.raises(ValueError, match=r"iter_0000001 is a reward model; a policy is needed here"):
        load_weights(read_info(tmp_path), policy.chunks, head="policy")
    assert equal_weights(policy.weights(), before)


def test_weights_the_checkpoint_lacks_are_refused(single, tmp_path):
    Training(single).save(tmp_path, 1, with_optimizer=False)
    untied = Training(single, untie_embeddings_and_output_weights=True)
    with pytest.raises(Exception, match=r"output_layer\.weight"):
        load_weights(read_info(tmp_path), untied.chunks, head="policy")


def test_resuming_needs_the_optimizer_and_the_same_precision(single, tmp_path):
    training = Training(single)
    training.save(tmp_path / "weights", 1, with_optimizer=False)
    with pytest.raises(ValueError, match="saved with --no-save-optim: add --finetune"):
        training.resume(read_info(tmp_path / "weights"))
    training.save(tmp_path / "all", 1)
    with pytest.raises(ValueError, match="bf16=False, this run has bf16=True"):
        Training(single, bf16=True).resume(read_info(tmp_path / "all"))


def test_random_states_of_another_layout_are_left_out(single, tmp_path, caplog):
    training = Training(single)
    training.step()
    training.save(tmp_path, 1)
    info = dataclasses.replace(read_info(tmp_path), layout={"pipeline": 2, "tensor": 1, "data": 1})
    state = torch.get_rng_state()
    torch.rand(1)
    training.resume(info)
    assert not torch.equal(torch.get_rng_state(), state)
    assert "random states" in caplog.text


def test_a_folder_that_is_no_checkpoint_is_named_with_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"absent does not exist"):
        read_info(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"holds no checkpoint: it has no {LATEST}"):
        read_info(tmp_path)
    (tmp_path / LATEST).write_text("soon")
    with pytest.raises(ValueError, match="says 'soon', which is not an iteration number"):
        read_info(tmp_path)
    (tmp_path / LATEST).write_text("12\n")
    with pytest.raises(ValueError, match=f"iter_0000012 has no {INFO}"):
        read_info(tmp_path)


def test_a_save_that_is_cut_off_leaves_the_checkpoint_before_it(single, tmp_path, monkeypatch):
    training = Training(single)
    training.save(tmp_path, 1, with_optimizer=False)

    def disk_full(self, directory):
        raise OSError("no space left")

    monkeypatch.setattr(FakeTokenizer, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        training.save(tmp_path, 2, with_optimizer=False)
    assert read_info(tmp_path).iteration == 1
    assert json.loads((tmp_path / "iter_0000001" / INFO).read_text())["iteration"] == 1
