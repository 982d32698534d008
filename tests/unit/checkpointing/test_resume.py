"""Checkpoints of one process: what is saved is loaded, and what does not fit is refused."""

import random

import numpy
import pytest
import torch
from helpers.tiny_training import Training, equal_weights

from megatron_brain.checkpointing import has_checkpoint, load, load_weights, read_info, read_records
from megatron_brain.checkpointing.folders import LATEST
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import architecture
from megatron_brain.runtime.random_state import random_state


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
    path = training.save(tmp_path, 100, with_optimizer=False, stage={"num_samples": 7})
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


def test_records_of_the_stage_come_back_as_they_were(single, tmp_path):
    records = [{"id": "a", "log_prior": -0.1, "text": "é\u2028 in a line\n"}, {"id": "b", "log_prior": 1 / 3}]
    Training(single).save(tmp_path, 1, records=records)
    assert read_records(read_info(tmp_path)) == records
    Training(single).save(tmp_path, 2)
    assert read_records(read_info(tmp_path)) == []


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
    with pytest.raises(ConfigError, match=r"iter_0000001 is a reward model; a policy is needed here"):
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
    with pytest.raises(ConfigError, match="holds no optimizer state .* add --finetune"):
        training.resume(read_info(tmp_path / "weights"))
    training.save(tmp_path / "all", 1)
    with pytest.raises(ConfigError, match="bf16=False, this run has bf16=True"):
        Training(single, bf16=True).resume(read_info(tmp_path / "all"))


def test_random_states_of_another_layout_or_device_are_left_out(single, tmp_path, caplog, monkeypatch):
    training = Training(single)
    training.step()
    training.save(tmp_path, 1)
    state = random_state()
    monkeypatch.setattr(load, "random_state", lambda: {**state, "cuda": torch.zeros(16, dtype=torch.uint8)})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    training.resume(read_info(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    assert "random states" in caplog.text


def test_a_run_goes_on_after_a_save_before_its_first_update(single, tmp_path):
    saved, other = Training(single), Training(single)
    saved.save(tmp_path, 0)
    resumed = Training(single, seed=5)
    resumed.resume(read_info(tmp_path))
    for training in (saved, other, resumed):
        training.step()
    assert equal_weights(saved.weights(), other.weights()) and equal_weights(resumed.weights(), other.weights())


def test_saving_an_iteration_again_replaces_it(single, tmp_path):
    training = Training(single)
    training.save(tmp_path, 1, with_optimizer=False)
    training.step()
    training.save(tmp_path, 1, with_optimizer=False)
    loaded = Training(single, seed=5)
    load_weights(read_info(tmp_path), loaded.chunks, head="policy")
    assert equal_weights(loaded.weights(), training.weights())


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
