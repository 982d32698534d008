"""Rotary frequencies against transformers, and the rotation against complex numbers."""

import pytest
import torch
from helpers.packed import DIM, random_qkv
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_brain.config.model import ModelConfig
from megatron_brain.models.architecture import resolve
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.rotary import Rotated, scale_frequencies


def frequencies(channels, base=10000.0):
    return 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)


@pytest.mark.parametrize(
    ("base", "factor", "low", "high", "original"),
    [
        (500000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        (10000.0, 2.5, 0.5, 6.0, 100),
        (10000.0, 1.5, 3.0, 3.5, 2048),
        (10000.0, 4.0, 1.0, 4.0, 3),  # no frequency stays as it is
    ],
)
def test_scaled_frequencies_are_those_of_transformers_bit_for_bit(base, factor, low, high, original):
    model = resolve(
        ModelConfig(
            num_layers=1,
            hidden_size=512,
            ffn_hidden_size=8,
            num_attention_heads=4,
            vocab_size=8,
            rotary_base=base,
            rope_scaling_factor=factor,
            rope_low_freq_factor=low,
            rope_high_freq_factor=high,
            rope_original_max_position_embeddings=original,
        ),
        None,
        "the test",
    )
    rope = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=2**17, rope_parameters=rope)
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    unscaled = frequencies(128, base)
    assert scale == 1.0
    assert not torch.equal(expected, unscaled)
    assert torch.equal(scale_frequencies(unscaled, model), expected)


def rotation(turns, *, dim=DIM):
    """Rotation by three positions and frequencies `[r/2]`."""
    return Rotated.by_positions(PackedLayout(), torch.tensor([0, 5, 2]), turns, dim)


@pytest.mark.parametrize("rotated", [DIM, DIM // 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_rotation_turns_the_complex_number_of_two_halves_and_leaves_the_other_channels(dtype, tolerance, rotated):
    turns = torch.rand(rotated // 2, generator=torch.Generator().manual_seed(0)) * 6
    tensor = random_qkv(3)[0].to(dtype)
    actual = rotation(turns).rotate(tensor)
    assert actual.dtype == dtype
    angles = (torch.tensor([0, 5, 2])[:, None] * turns)[:, None].double()
    turned = torch.complex(*tensor[..., :rotated].double().chunk(2, dim=-1)) * torch.polar(
        torch.ones(()).double(), angles
    )
    expected = torch.cat([turned.real, turned.imag, tensor[..., rotated:].double()], -1)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)
    assert torch.equal(actual[..., rotated:], tensor[..., rotated:])


@pytest.mark.parametrize("rotated", [DIM, DIM // 2])
def test_the_gradient_of_the_rotation_is_its_derivative(rotated):
    turns = torch.rand(rotated // 2, generator=torch.Generator().manual_seed(0)) * 6
    tensor = random_qkv(3)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(rotation(turns).rotate, tensor)
