"""Which modules a layer is made of, under which names its weights are stored, and which of them decay."""

from collections import Counter

import pytest
from helpers.architectures import ARCHITECTURES
from helpers.assets import SIZES
from helpers.tiny_training import Training

from megatron_brain.checkpointing.state import model_boxes, optimizer_boxes
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.models import specs
from megatron_brain.models.architecture import resolve
from megatron_brain.models.parallel_residual import ParallelResidualLayer
from megatron_brain.models.provider import build_model

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
