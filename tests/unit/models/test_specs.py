"""Which modules a layer is made of, under which names its weights are stored, and which of them decay."""

from collections import Counter

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.assets import SIZES
from helpers.tiny_training import Training

from megatron_brain.checkpointing.state import model_boxes, optimizer_boxes
from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.errors import ConfigError
from megatron_brain.models import provider, specs
from megatron_brain.models.architecture import resolve
from megatron_brain.models.fp8 import spec as fp8_spec
from megatron_brain.models.parallel_residual import ParallelResidualLayer
from megatron_brain.models.provider import build_model
from megatron_brain.runtime import transformer_engine

LLAMA_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
BIASES = {name.replace("weight", "bias") for name in LLAMA_LAYER}
LAYERS = {
    "gpt2": LLAMA_LAYER | BIASES,
    "qwen3": LLAMA_LAYER
    | {
        "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
    },
    "gpt_neox": LLAMA_LAYER | BIASES,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_stored_under_the_names_that_transformer_engines_layers_have(single, name):
    settings = ARCHITECTURES[name]
    model = resolve(ModelConfig(**SIZES, **settings), None, "the test")
    chunks = build_model(model, ParallelConfig(), single, head="policy", seed=None)
    outside = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    if "normalization" in settings:
        outside.add("decoder.final_layernorm.bias")
    if "position_embedding_type" in settings:
        outside.add("embedding.position_embeddings.weight")
    else:
        outside.add("output_layer.weight")
    layers = {f"decoder.layers.{i}.{key}" for i in range(SIZES["num_layers"]) for key in LAYERS[name]}
    assert {box.key for box in model_boxes(chunks)} == outside | layers


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_both_specs_have_the_layer_with_a_parallel_residual(monkeypatch, impl):
    monkeypatch.setattr(specs, "get_gpt_layer_with_transformer_engine_spec", specs.get_gpt_layer_local_spec)
    for name, settings in ARCHITECTURES.items():
        spec = specs.layer_spec(impl, resolve(ModelConfig(**SIZES, **settings), None, "the test"))
        assert issubclass(spec.module, ParallelResidualLayer) == (name == "gpt_neox")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_biases_and_norms_do_not_decay_and_matrices_do(single, name):
    training = Training(single, **ARCHITECTURES[name])
    decays = {id(p): group["wd_mult"] for group in training.optimizer.param_groups for p in group["params"]}
    parameters = dict(training.chunks[0].named_parameters())
    assert {key: decays[id(p)] for key, p in parameters.items()} == {
        key: float(p.dim() > 1) for key, p in parameters.items()
    }


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_optimizers_state_of_every_weight_is_stored(single, name, distributed_optimizer):
    training = Training(single, distributed_optimizer=distributed_optimizer, **ARCHITECTURES[name])

    def elements(boxes):
        found = Counter()
        for box in boxes:
            found[box.key] += box.data.numel()
        return found

    weights = elements(model_boxes(training.chunks))
    expected = {f"optimizer.{moment}.{key}": n for key, n in weights.items() for moment in ("exp_avg", "exp_avg_sq")}
    assert elements(optimizer_boxes(training.optimizer, training.chunks)) == expected


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CHOICES = [
    # problem of Transformer Engine, device, its capability, what auto takes, why
    (None, GPU, (9, 0), "transformer_engine", "version 2.16.0"),
    (None, GPU, (8, 0), "transformer_engine", "version 2.16.0"),
    (None, GPU, (7, 5), "local", "the device has compute capability 7.5, Transformer Engine needs 8.0"),
    (None, CPU, None, "local", "there is no CUDA device"),
    ("transformer_engine is not installed", GPU, (9, 0), "local", "transformer_engine is not installed"),
    ("transformer_engine 2.3 is older than 2.9", GPU, (9, 0), "local", "transformer_engine 2.3 is older than 2.9"),
]


@pytest.mark.parametrize(("problem", "device", "capability", "impl", "why"), CHOICES)
def test_auto_takes_transformer_engine_where_it_runs_and_a_request_that_cannot_be_is_an_error(
    monkeypatch, problem, device, capability, impl, why
):
    monkeypatch.setattr(transformer_engine, "problem", lambda: problem)
    monkeypatch.setattr(transformer_engine, "version", lambda: "2.16.0")
    monkeypatch.setattr(transformer_engine, "capability", lambda device: capability)
    assert specs.choose_transformer_impl("auto", device) == (impl, why)
    assert specs.choose_transformer_impl("local", device) == ("local", "asked for")
    if impl == "transformer_engine":
        assert specs.choose_transformer_impl("transformer_engine", device) == (impl, why)
        return
    with pytest.raises(ConfigError) as caught:
        specs.choose_transformer_impl("transformer_engine", device)
    assert why in str(caught.value) and "use --transformer-impl local, or pip install" in str(caught.value)


def build_in_fp8(single, monkeypatch, impl="transformer_engine", **fp8):
    """As far as the checks of FP8; what is built is then refused on purpose."""
    monkeypatch.setattr(provider, "choose_transformer_impl", lambda requested, device: (impl, "the test says so"))
    monkeypatch.setattr(provider, "_trunk", lambda *args, **options: pytest.fail("weights were made"))
    monkeypatch.setattr(transformer_engine, "version", lambda: "2.16.0")
    model = resolve(ModelConfig(bf16=True, **SIZES), None, "the test")
    fp8 = Fp8Config(fp8_format="hybrid", **fp8)
    build_model(model, ParallelConfig(), single, head="policy", seed=None, fp8=fp8)


def test_fp8_on_other_layers_than_transformer_engines_is_refused_before_weights_are_made(single, monkeypatch):
    with pytest.raises(ConfigError, match=r"fp8_format=hybrid needs .* transformer_engine, .* local ones \(the test"):
        build_in_fp8(single, monkeypatch, impl="local")


def test_a_recipe_that_the_device_has_not_is_refused_before_weights_are_made(single, monkeypatch):
    monkeypatch.setattr(transformer_engine, "capability", lambda device: (9, 0))
    with pytest.raises(
        ConfigError, match="fp8_recipe=mxfp8 needs compute capability 10.0 or higher, the device has 9.0"
    ):
        build_in_fp8(single, monkeypatch, fp8_recipe="mxfp8")


def test_a_recipe_that_cannot_be_made_is_refused_before_weights_are_made(single, monkeypatch):
    def get_fp8_recipe(config):
        raise ValueError(f"Failed to import module '{config.fp8_quantizer_factory}'")

    monkeypatch.setattr(fp8_spec, "get_fp8_recipe", get_fp8_recipe)
    with pytest.raises(ConfigError, match=r"fp8_recipe=custom: Transformer Engine 2.16.0 .* import module 'no.such'"):
        build_in_fp8(single, monkeypatch, fp8_recipe="custom", fp8_quantizer_factory="no.such")


def test_emulation_takes_the_local_layers_and_leaves_megatron_core_without_fp8(single):
    fp8 = Fp8Config(fp8_format="hybrid", fp8_emulate=True)
    model = resolve(ModelConfig(**SIZES), None, "the test")
    assert specs.requested_impl(model, fp8) == "local" and specs.requested_impl(model, Fp8Config()) == "auto"
    assert provider.transformer_config(model, ParallelConfig(), fp8).fp8 is None
