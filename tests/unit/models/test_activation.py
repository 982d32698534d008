"""The gated activation against plain PyTorch, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.models import specs
from megatron_brain.models.activation import GatedSilu
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model, transformer_config
from megatron_brain.runtime.megatron_versions import mlp_submodules


@pytest.fixture
def activation():
    return GatedSilu(transformer_config(resolve(ModelConfig(**SIZES), None, ""), ParallelConfig()))


def plain(gate_and_up):
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_and_its_gradient_are_those_of_plain_operations(activation, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs, upstream = (torch.randn(5, 1, size, generator=generator).to(dtype) for size in (14, 7))
    results = []
    for function in (activation, plain):
        leaf = inputs.clone().requires_grad_()
        out = function(leaf)
        out.backward(upstream)
        results.append((out.detach(), leaf.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_the_gradient_is_the_derivative(activation):
    assert torch.autograd.gradcheck(activation, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


def test_it_keeps_its_input_alone(activation):
    gate_and_up = torch.randn(3, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        activation(gate_and_up)
    assert [tensor.data_ptr() for tensor in kept] == [gate_and_up.data_ptr()]


def test_both_specs_have_it(single, monkeypatch):
    [model] = build_model(resolve(ModelConfig(**SIZES), None, ""), ParallelConfig(), single, head="policy", seed=1)
    assert all(isinstance(layer.mlp.activation_func, GatedSilu) for layer in model.decoder.layers)
    monkeypatch.setattr(specs, "get_gpt_layer_with_transformer_engine_spec", specs.get_gpt_layer_local_spec)
    model = resolve(ModelConfig(**SIZES), None, "")
    assert mlp_submodules(specs.layer_spec("transformer_engine", model)).activation_func is GatedSilu
