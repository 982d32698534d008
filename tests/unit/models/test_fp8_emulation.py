"""Rounding to FP8 against a list of all numbers that FP8 has, and the linear layers made of it."""

import itertools

import pytest
import torch
from helpers.tiny_training import BATCHES, SIZES

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.models.architecture import resolve
from megatron_brain.models.fp8.emulation import (
    E4M3,
    E5M2,
    E4M3ColumnParallelLinear,
    E4M3RowParallelLinear,
    HybridColumnParallelLinear,
    HybridRowParallelLinear,
    emulated_linear,
    quantize,
)
from megatron_brain.models.fp8.state import switched_off
from megatron_brain.models.provider import build_model
from megatron_brain.runtime.parallel import Parallel

FORMATS = {E4M3: (3, 7, 448.0), E5M2: (2, 15, 57344.0)}
"""Bits of the mantissa, bias of the exponent, and largest number, as in https://arxiv.org/abs/2209.05433."""


def finite_numbers(mantissa_bits: int, bias: int, largest: float) -> torch.Tensor:
    """Every finite number of the format, from its 256 codes: sign, exponent, mantissa."""
    numbers = {0.0}
    for exponent, mantissa in itertools.product(range(2 ** (7 - mantissa_bits)), range(2**mantissa_bits)):
        fraction = mantissa / 2**mantissa_bits
        value = 2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
        # The last codes are infinities and NaN.
        numbers |= {value, -value} if value <= largest else set()
    return torch.tensor(sorted(numbers), dtype=torch.float64)


def nearest(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The nearest number; of two as near, the one with an even mantissa, which are every second one from zero."""
    order = numbers.abs().unique()
    distances = (values.double().abs()[..., None] - order).abs()
    tied = distances == distances.min(-1, keepdim=True).values
    even = torch.arange(len(order)) % 2 == 0
    chosen = order[(tied.int() * 2 - (tied & ~even).int()).argmax(-1)]
    return torch.where(values.double() < 0, -chosen, chosen)


def test_the_formats_have_the_numbers_they_are_said_to_have():
    assert {
        dtype: (len(finite_numbers(*shape)), finite_numbers(*shape).max().item()) for dtype, shape in FORMATS.items()
    } == {
        E4M3: (253, 448.0),
        E5M2: (247, 57344.0),
    }


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_value_becomes_the_nearest_number_of_the_format(dtype):
    numbers = finite_numbers(*FORMATS[dtype])
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    # With the largest number among them the scale is 1, and rounding is all there is.
    values = torch.cat([numbers, midpoints, midpoints * (1 + 1e-6), midpoints * (1 - 1e-6)]).float()
    rounded = quantize(values[None], dtype)
    assert rounded.inverse_scale.item() == 1.0
    assert torch.equal(rounded.dequantized()[0].double(), nearest(values, numbers))


def test_the_largest_magnitude_becomes_the_formats_largest_number():
    rounded = quantize(torch.tensor([[-3.5, 1.0, 0.0013]]), E4M3)
    assert rounded.codes.float().tolist() == [[-448.0, 128.0, 0.171875]]  # 0.1664 lies between 0.15625 and 0.171875.
    assert rounded.inverse_scale.item() == pytest.approx(3.5 / 448)


def test_zeros_stay_zero_and_numbers_too_small_for_a_scale_do_not_become_infinite():
    assert quantize(torch.zeros(2, 3), E4M3).dequantized().tolist() == [[0.0] * 3] * 2
    tiny = quantize(torch.tensor([[1e-39, -2e-39]]), E4M3)
    assert tiny.codes.float().tolist() == [[0.34375, -0.6875]]  # Times the largest float32, not times 448 / 2e-39.


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_output(wrong):
    inputs = torch.tensor([[1.0, 2.0], [3.0, wrong]])
    assert not emulated_linear(inputs, torch.ones(1, 2), None, E5M2)[1].isfinite().any()


@pytest.mark.parametrize(("gradient_type", "rounded_gradient"), [(E5M2, 0.625), (E4M3, 0.5625)])
def test_a_product_of_numbers_worked_by_hand(gradient_type, rounded_gradient):
    """The largest input, weight and gradient are powers of two times the formats' largest numbers, so that scales are
    powers of two and every number below can be checked against the formats by eye."""
    inputs = torch.tensor([[448.0, 17.0]], requires_grad=True)  # 17 lies between 16 and 18, even is 16.
    weight = torch.tensor([[448.0, 1.0], [0.0, 1.07]], requires_grad=True)  # 1.07 is nearer to 1.125 than to 1.
    bias = torch.tensor([0.5, 0.25], requires_grad=True)
    output = emulated_linear(inputs, weight, bias, gradient_type)
    assert output.tolist() == [[448.0 * 448 + 16 + 0.5, 16 * 1.125 + 0.25]]
    # In e5m2 the neighbours of 0.58 are 0.5 and 0.625, in e4m3 0.5625 and 0.625.
    largest = 448.0 if gradient_type == E4M3 else 57344.0
    output.backward(torch.tensor([[largest, 0.58]]))
    assert inputs.grad.tolist() == [[largest * 448, largest + rounded_gradient * 1.125]]
    assert weight.grad.tolist() == [[largest * 448, largest * 16], [rounded_gradient * 448, rounded_gradient * 16]]
    assert bias.grad.tolist() == [largest, pytest.approx(0.58)]


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    inputs, weight = torch.ones(3, 2, 4, requires_grad=True), torch.ones(5, 4)
    emulated_linear(inputs, weight, None, E5M2).sum().backward()
    assert weight.grad is None
    assert inputs.grad.tolist() == torch.full((3, 2, 4), 5.0).tolist()


def build(parallel: Parallel, fp8: Fp8Config | None, **settings):
    model = resolve(ModelConfig(**SIZES | settings), None, "the test")
    (chunk,) = build_model(model, ParallelConfig(), parallel, head="policy", seed=1, fp8=fp8)
    return chunk


@pytest.mark.parametrize(
    ("settings", "emulated"),
    [
        ({}, [0, 1, 2, 3]),
        ({"first_last_layers_bf16": True}, [1, 2]),
        ({"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0}, [2, 3]),
    ],
)
@pytest.mark.parametrize(
    ("fp8_format", "column", "row"),
    [
        ("hybrid", HybridColumnParallelLinear, HybridRowParallelLinear),
        ("e4m3", E4M3ColumnParallelLinear, E4M3RowParallelLinear),
    ],
)
def test_the_linear_maps_of_the_layers_asked_for_are_emulated(single, settings, emulated, fp8_format, column, row):
    chunk = build(single, Fp8Config(fp8_format=fp8_format, fp8_emulate=True, **settings))
    for number, layer in enumerate(chunk.decoder.layers):
        attention, mlp = layer.self_attention, layer.mlp
        expected = (column, row) * 2 if number in emulated else None
        found = tuple(
            type(each) for each in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        )
        assert (found == expected) if expected else not {column, row} & set(found)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_keeps_its_weights_and_names_and_computes_a_little_else(single, bf16):
    plain, emulated = (
        build(single, None, bf16=bf16),
        build(single, Fp8Config(fp8_format="hybrid", fp8_emulate=True), bf16=bf16),
    )
    assert plain.state_dict().keys() == emulated.state_dict().keys()
    assert plain.sharded_state_dict().keys() == emulated.sharded_state_dict().keys()
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), emulated.parameters(), strict=True))
    expected, actual = plain(BATCHES[0]), emulated(BATCHES[0])
    expected.sum().backward()
    actual.sum().backward()
    assert 1e-4 < (actual - expected).abs().max() < 2e-2
    pairs = zip(plain.parameters(), emulated.parameters(), strict=True)
    cosines = [torch.cosine_similarity(a.grad.float().flatten(), b.grad.float().flatten(), 0).item() for a, b in pairs]
    assert 0.98 < min(cosines) < 0.9999


def test_hybrid_and_e4m3_differ_in_the_backward_pass_alone(single):
    models = [build(single, Fp8Config(fp8_format=each, fp8_emulate=True)) for each in ("hybrid", "e4m3")]
    outputs = [model(BATCHES[0]) for model in models]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    for which in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        one, other = ([p.grad for name, p in model.named_parameters() if which in name] for model in models)
        assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_switched_off_a_model_computes_what_it_does_without_fp8_and_back_on_what_it_did(single):
    plain, emulated = build(single, None), build(single, Fp8Config(fp8_format="hybrid", fp8_emulate=True))
    before = emulated(BATCHES[0])
    with switched_off([emulated]):
        assert torch.equal(emulated(BATCHES[0]), plain(BATCHES[0]))
    assert torch.equal(emulated(BATCHES[0]), before)
    assert not torch.equal(before, plain(BATCHES[0]))
