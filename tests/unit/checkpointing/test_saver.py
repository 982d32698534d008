"""The saver: at once or in the background, whole or not at all."""

import resource
import signal
import threading

import pytest
import torch
from helpers.tiny_training import Training, equal_weights

from megatron_brain.checkpointing import CheckpointError, TrainingState, load_weights, read_info
from megatron_brain.checkpointing import save as saving
from megatron_brain.checkpointing.state import model_boxes
from megatron_brain.errors import ConfigError


@pytest.fixture
def training(single):
    training = Training(single)
    training.step()
    return training


@pytest.fixture
def slow_writes(monkeypatch):
    """Writing waits until the event is set."""
    go_on = threading.Event()
    write_boxes = saving.write_boxes

    def wait_and_write(*args):
        assert go_on.wait(timeout=30)
        write_boxes(*args)

    monkeypatch.setattr(saving, "write_boxes", wait_and_write)
    return go_on


def test_training_goes_on_while_a_checkpoint_of_before_is_written(training, tmp_path, slow_writes):
    training.config.checkpoint.async_save = True
    saver = training.saver(tmp_path)
    before = training.weights()
    saver.save(1, training.chunks, training.state())
    training.step()
    assert not equal_weights(training.weights(), before)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        read_info(tmp_path)
    slow_writes.set()
    saver.wait()
    resumed = Training(training.parallel, seed=9)
    resumed.resume(read_info(tmp_path))
    assert equal_weights(resumed.weights(), before)
    resumed.step()
    assert equal_weights(resumed.weights(), training.weights())


def test_one_save_ends_before_the_next_starts(training, tmp_path, slow_writes):
    training.config.checkpoint.async_save = True
    saver = training.saver(tmp_path)
    saver.save(1, training.chunks, training.state())
    threading.Timer(0.3, slow_writes.set).start()
    saver.save(2, training.chunks, training.state())
    assert read_info(tmp_path).iteration in (1, 2)
    saver.wait()
    assert read_info(tmp_path).iteration == 2


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_that_fails_says_so_and_leaves_the_one_before(training, tmp_path, monkeypatch, in_background):
    training.config.checkpoint.async_save = in_background
    saver = training.saver(tmp_path)
    saver.save(1, training.chunks, training.state())
    saver.wait()

    def fail(config, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_config", fail)
    expected = r"iteration 2 could not be saved to .*rank 0: OSError: \[Errno 28\] No space left on device.*auto-resume"
    with pytest.raises(CheckpointError, match=expected):
        saver.save(2, training.chunks, training.state())
        if in_background:
            saver._thread.join()
            assert saver.failed
            saver.wait()
    assert not saver.failed
    assert read_info(tmp_path).iteration == 1
    monkeypatch.undo()
    saver = training.saver(tmp_path)
    saver.save(2, training.chunks, training.state())
    saver.wait()
    assert read_info(tmp_path).iteration == 2
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


def test_a_file_that_cannot_grow_is_a_save_that_fails(training, tmp_path):
    """The operating system refuses writes beyond a file size, as it does on a full disk."""
    saver = training.saver(tmp_path)
    saver.save(1, training.chunks, training.state())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="iteration 2 could not be saved to .*rank 0: "):
            saver.save(2, training.chunks, training.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_info(tmp_path).iteration == 1
    load_weights(read_info(tmp_path), Training(training.parallel, seed=9).chunks, head="policy")


def test_only_the_latest_checkpoints_are_kept(training, tmp_path):
    training.config.checkpoint.keep_latest = 2
    saver = training.saver(tmp_path, protected=[tmp_path / "iter_0000001"])
    for iteration in range(1, 5):
        saver.save(iteration, training.chunks, TrainingState())
    assert [path.name for path in sorted(tmp_path.glob("iter_*"))] == ["iter_0000001", "iter_0000003", "iter_0000004"]


def test_a_save_can_be_tried_again(training, tmp_path, monkeypatch):
    saver = training.saver(tmp_path)

    def fail(config, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(saving, "save_config", fail)
        with pytest.raises(CheckpointError, match="No space left"):
            saver.save(1, training.chunks, training.state())
    saver.save(1, training.chunks, training.state())
    assert read_info(tmp_path).iteration == 1


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda file: file.unlink(), "weights_00000.safetensors is not there; do all nodes see this folder"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "weights_00000.safetensors has .* bytes, written were"),
    ],
)
def test_a_checkpoint_of_which_a_file_is_missing_or_cut_off_is_not_published(
    training, tmp_path, monkeypatch, damage, problem
):
    """As where --save is a folder of each node's own, or storage loses what was written."""
    saver = training.saver(tmp_path)
    saver.save(1, training.chunks, training.state())
    write_boxes = saving.write_boxes

    def write_and_lose(boxes, folder, group):
        write_boxes(boxes, folder, group)
        for file in folder.glob("*.safetensors"):
            damage(file)

    monkeypatch.setattr(saving, "write_boxes", write_and_lose)
    with pytest.raises(CheckpointError, match=problem):
        saver.save(2, training.chunks, training.state())
    assert read_info(tmp_path).iteration == 1


def test_the_generation_config_of_the_model_before_is_kept(training, tmp_path):
    kept = {"eos_token_id": [1, 2], "temperature": 0.6}
    training.saver(tmp_path, generation_config=kept).save(1, training.chunks, TrainingState())
    assert read_info(tmp_path).generation_config == kept
    training.saver(tmp_path).save(2, training.chunks, TrainingState())
    assert read_info(tmp_path).generation_config == {}


def test_the_memory_of_copies_is_used_again(training):
    copies = saving._HostCopies()
    boxes = model_boxes(training.chunks)
    first = copies.take(boxes)
    with torch.no_grad():
        boxes[0].data.add_(1.0)
    assert not torch.equal(first[0].data, boxes[0].data)
    again = copies.take(boxes)
    assert torch.equal(again[0].data, boxes[0].data)
    assert [box.data.data_ptr() for box in first] == [box.data.data_ptr() for box in again]
