"""Checkpoints of a CUDA device, with copies in pinned memory and Adam's state on the device. Not run on a GPU yet."""

import pytest
import torch
from helpers.tiny_training import Training, equal_weights

from megatron_brain.checkpointing import read_info

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_background_save_is_of_its_moment_and_resumes(single, tmp_path, bf16, distributed_optimizer):
    options = {"bf16": bf16, "distributed_optimizer": distributed_optimizer}
    training = Training(single, **options)
    training.config.checkpoint.async_save = True
    training.step()
    saver, before = training.saver(tmp_path), training.weights()
    saver.save(1, training.chunks, training.state())
    training.step()
    saver.wait()
    resumed = Training(single, seed=9, **options)
    resumed.resume(read_info(tmp_path))
    assert equal_weights(resumed.weights(), before)
    resumed.step()
    for name, weight in resumed.weights().items():
        assert torch.allclose(weight, training.weights()[name], rtol=1e-4, atol=1e-6), name
