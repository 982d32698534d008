"""Frozen weights in host memory: lent bit for bit, absent otherwise."""

import pytest
import torch
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.models.architecture import resolve
from megatron_brain.models.offload import HostWeights
from megatron_brain.models.provider import build_model

BATCH = pack_groups([Group(prompt=(1, 2, 3), responses=((4, 5), (6, 7, 8)))], shared_prefix=True)


def build(parallel, head, **changes):
    model = resolve(ModelConfig(init_method_std=0.2, **SIZES | changes), None, "the test")
    chunks = build_model(model, ParallelConfig(), parallel, head=head, seed=1)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("head", ["policy", "reward"])
def test_weights_come_back_bit_for_bit_and_give_the_same_output_each_time(single, head, bf16):
    chunks = build(single, head, bf16=bf16)
    before = {name: weight.clone() for name, weight in chunks[0].named_parameters()}
    expected = chunks[0](BATCH)
    weights = HostWeights(chunks)
    for _ in range(2):
        with weights.on_device():
            assert all(torch.equal(weight, before[name]) for name, weight in chunks[0].named_parameters())
            assert all(weight.dtype == before[name].dtype for name, weight in chunks[0].named_parameters())
            assert torch.equal(chunks[0](BATCH), expected)


def test_away_from_the_device_the_weights_take_no_room_and_cannot_be_used(single):
    chunks = build(single, "policy")
    weights = HostWeights(chunks)
    assert sum(parameter.numel() for parameter in chunks[0].parameters()) == 0
    with pytest.raises((RuntimeError, IndexError)):
        chunks[0](BATCH)
    with pytest.raises(ZeroDivisionError), weights.on_device():
        raise ZeroDivisionError
    assert sum(parameter.numel() for parameter in chunks[0].parameters()) == 0, "they leave after an error too"


def test_weights_that_are_trained_are_refused(single):
    chunks = build(single, "policy")
    next(chunks[0].parameters()).requires_grad_()
    with pytest.raises(AssertionError, match="not trained"):
        HostWeights(chunks)
