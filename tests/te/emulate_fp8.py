"""Compares the emulated FP8 layers with Transformer Engine's reference on a CPU. `emulate_fp8.py` prints JSON.

products: for everything that is compared, the number of random cases that differ in a bit. model: log-probabilities and
gradients of a model with Transformer Engine's FP8 layers, with emulated layers and with plain ones, all of the same
weights.
"""

import itertools
import json

import fake_te

# This comes before megatron-core looks for Transformer Engine.
fake_te.import_without_extension()

# ruff: noqa: E402
import torch
from helpers.assets import SIZES
from helpers.tiny_training import BATCHES
from torch import Tensor
from transformer_engine.pytorch.custom_recipes.gemm import custom_gemm
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.models import provider
from megatron_brain.models.architecture import resolve
from megatron_brain.models.fp8.emulation import E4M3, E5M2, emulated_linear, quantize
from megatron_brain.runtime import parallel

FACTORY = "transformer_engine.pytorch.custom_recipes.reference_current_scaling.current_scaling_ref_factory"
CASES = 120
"""Number of cases, of random shapes and contents, for each type of the gradient and of the operands."""


def main() -> None:
    # For some processors oneDNN has another FP8 product, which adds up in another order and takes minutes.
    with torch.backends.mkldnn.flags(enabled=False):
        products = compare_products()
    print(json.dumps({"products": products, "model": compare_models()}))


def compare_products() -> dict[str, int]:
    """Number of differing cases, for everything that a linear map rounds and computes."""
    generator = torch.Generator().manual_seed(1)
    wrong = dict.fromkeys(("cases", "codes", "scale", "output", "grad_input", "grad_weight"), 0)
    for gradient_type, dtype in itertools.product((E5M2, E4M3), (torch.float32, torch.bfloat16)):
        for number in range(CASES):
            rows, width, out = torch.randint(1, 97, (3,), generator=generator).tolist()
            inputs = contents(number, (rows, width), dtype, generator)
            weight = contents(number // 2, (out, width), dtype, generator)
            grad = contents(number // 3, (rows, out), dtype, generator)
            bias = torch.randn(out, generator=generator).to(dtype) if number % 3 == 0 else None
            wrong["cases"] += 1
            for tensor, kind in ((inputs, E4M3), (weight, E4M3), (grad, gradient_type)):
                ours, theirs = quantize(tensor, kind), CurrentScalingQuantizerRef(dtype=kind).quantize(tensor)
                wrong["codes"] += differ(ours.codes.float(), theirs.data.float())
                wrong["scale"] += differ(ours.inverse_scale, theirs.scale)
            for name, mine, reference in zip(
                ("output", "grad_input", "grad_weight"),
                by_emulation(inputs, weight, bias, grad, gradient_type),
                by_reference(inputs, weight, bias, grad, gradient_type),
                strict=True,
            ):
                assert mine.dtype == reference.dtype == dtype
                wrong[name] += differ(mine, reference)
    return wrong


def contents(number: int, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers. In some cases they are of extreme sizes, all zero, or partly not finite."""
    scale = 10 ** torch.empty(()).uniform_(-8, 8, generator=generator).item()
    values = torch.randn(shape, generator=generator) * scale
    kind = number % 12
    if kind == 1:
        values.zero_()
    elif kind == 2:
        values = torch.randn(shape, generator=generator) * 1e-39  # Denormal, too small for a scale.
    elif kind == 3:
        values = torch.randn(shape, generator=generator).clamp(-1, 1) * 3e38
    elif kind == 4:
        values[0, 0] = 1e4 * scale  # All others then round to very few different values, or to zero.
    elif kind == 5:
        values *= 10 ** torch.empty(shape).uniform_(-12, 0, generator=generator)
    elif kind == 6:
        values[-1, -1] = torch.inf
    elif kind == 7:
        values[0, -1] = torch.nan
    elif kind == 8:
        values = values.abs().neg()
    return values.to(dtype)


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether the tensors differ in any bit. All NaNs count as equal."""
    return not torch.equal(one.isnan(), other.isnan()) or not torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def by_emulation(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, gradient_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, weight = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
    output = emulated_linear(inputs, weight, bias, gradient_type)
    output.backward(grad)
    return output.detach(), inputs.grad, weight.grad


def by_reference(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, gradient_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The three products, called as Transformer Engine's linear layer calls them."""
    forward, backward = (CurrentScalingQuantizerRef(dtype=kind) for kind in (E4M3, gradient_type))
    rounded, rounded_weight, rounded_grad = forward.quantize(inputs), forward.quantize(weight), backward.quantize(grad)
    settings = {"out_dtype": inputs.dtype, "use_split_accumulator": True}
    return (
        custom_gemm(rounded_weight, rounded, None, layout="TN", bias=bias, **settings)[0],
        custom_gemm(rounded_weight, rounded_grad, None, layout="NN", grad=True, **settings)[0],
        custom_gemm(rounded, rounded_grad, None, layout="NT", grad=True, **settings)[0],
    )


def compare_models() -> dict[str, dict]:
    world = parallel.start(ParallelConfig(), seed=1)
    fake_te.claim_cuda()
    # The function refuses Transformer Engine on the CPU.
    provider.choose_transformer_impl = lambda requested, device: (requested, "asked for")
    kinds = {
        "reference": ("transformer_engine", custom()),
        "emulation": ("local", Fp8Config(fp8_format="hybrid", fp8_emulate=True)),
        "plain": ("local", None),
    }
    measured = {}
    for name, (impl, fp8) in kinds.items():
        model = resolve(ModelConfig(transformer_impl=impl, **SIZES), None, "the test")
        (chunk,) = provider.build_model(model, ParallelConfig(), world, head="policy", seed=1, fp8=fp8)
        output = chunk(BATCHES[0])
        output.sum().backward()
        gradients = {key.replace("self_attention.", ""): value.grad for key, value in chunk.named_parameters()}
        measured[name] = {
            "logprobs": output.tolist(),
            "gradients": {key: gradients[key].flatten().tolist() for key in gradients if "norm" not in key},
        }
    parallel.stop()
    return measured


def custom() -> Fp8Config:
    return Fp8Config(fp8_format="hybrid", fp8_recipe="custom", fp8_quantizer_factory=FACTORY)


if __name__ == "__main__":
    main()
