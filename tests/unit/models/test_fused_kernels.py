"""Weight gradients added to their buffers by the product that computes them: when, and that nothing is lost or counted
twice. Apex's extension is stood in for by two lines of PyTorch."""

import sys
import types

import pytest
import torch
from helpers.tiny_training import BATCHES, Training
from megatron.core.tensor_parallel import layers

from megatron_brain.models import fused_kernels, provider
from megatron_brain.models.fused_kernels import EXTENSION, gradient_accumulation_fusion

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _look_again():
    fused_kernels._problem_of_extension.cache_clear()
    yield
    fused_kernels._problem_of_extension.cache_clear()


@pytest.fixture
def extension(monkeypatch):
    """A stand-in of the extension, and how often it was called."""
    module = types.ModuleType(EXTENSION)
    module.calls = 0

    def wgrad_gemm_accum_fp32(inputs, grad_output, main_grad):
        assert main_grad.dtype == torch.float32
        module.calls += 1
        main_grad.add_(grad_output.float().t() @ inputs.float())

    module.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32
    monkeypatch.setitem(sys.modules, EXTENSION, module)
    monkeypatch.setattr(layers, EXTENSION, module, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    return module


def test_it_is_on_where_there_are_cuda_and_the_extension(extension):
    assert gradient_accumulation_fusion(GPU) == (True, f"Apex's {EXTENSION}")
    assert gradient_accumulation_fusion(CPU) == (False, "there is no CUDA device")


def test_it_is_off_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, EXTENSION, None)  # An import of it raises ModuleNotFoundError.
    assert gradient_accumulation_fusion(GPU) == (False, f"Apex's {EXTENSION} is not installed")


def test_it_is_off_where_the_extension_was_built_for_another_torch(tmp_path, monkeypatch):
    (tmp_path / f"{EXTENSION}.py").write_text("raise ImportError('undefined symbol: _ZN2at4cuda')")
    monkeypatch.syspath_prepend(tmp_path)
    on, reason = gradient_accumulation_fusion(GPU)
    assert not on and reason.endswith("cannot be imported: undefined symbol: _ZN2at4cuda")


def gradients(single, **options):
    training = Training(single, lr=0.0, batches=BATCHES * 2, **options)
    for _ in range(2):  # The second step finds the marks of the first.
        training.step()
    return {name: parameter.main_grad.clone() for name, parameter in training.chunks[0].named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="tied embeddings"),
        pytest.param({"untie_embeddings_and_output_weights": True}, id="untied"),
        pytest.param({"head": "reward"}, id="reward head"),
        pytest.param({"recompute_granularity": "full"}, id="recomputed"),
        pytest.param({"add_bias_linear": True, "bf16": True}, id="biases, bfloat16"),
    ],
)
def test_gradients_are_those_without_it(single, monkeypatch, extension, options):
    expected = gradients(single, **options)
    assert extension.calls == 0
    monkeypatch.setattr(provider, "gradient_accumulation_fusion", lambda device: (True, "the test"))
    found = gradients(single, **options)
    assert extension.calls == 2 * 2 * 2 * 4, "two steps, two micro-batches, two layers with four linear maps"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        # In bfloat16 the product is rounded before it is added without the fusion.
        torch.testing.assert_close(found[name], gradient, **({"rtol": 1e-2, "atol": 1e-4} if "bf16" in options else {}))
