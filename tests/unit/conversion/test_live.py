"""Writing the policy that a run trains: who writes what, weights in FP8, models that cannot be written."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_brain.checkpointing.boxes import BoxPart
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion import registry
from megatron_brain.conversion.config_json import fixed
from megatron_brain.conversion.families import llama
from megatron_brain.conversion.live import untied, write_live
from megatron_brain.conversion.live_plan import Stage, plan
from megatron_brain.conversion.safetensors_writer import SafetensorsWriter
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import resolve
from megatron_brain.models.fp8 import weights as fp8_weights

LLAMA_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "untie_embeddings_and_output_weights": True,
}


def stage_of(ranks):
    """The only pipeline stage of Llama 3 8B: every rank has its rows of every weight, and all of each norm."""
    model = resolve(ModelConfig(**LLAMA_8B), None, "the test")
    held = [set() for _ in range(ranks)]
    for weight, layer in llama.FAMILY.entries(model, "policy"):
        shape = weight.shape(model)
        for rank, parts in enumerate(held):
            rows = shape[0] // ranks if len(shape) == 2 else shape[0]
            offset = (rows * rank, 0) if len(shape) == 2 else (0,)
            size = (rows, *shape[1:])
            parts.add(BoxPart(key=weight.key(layer), dtype=torch.bfloat16, shape=shape, offset=offset, size=size))
    return Stage(family=llama.FAMILY, model=model, untied=model, is_first=True, is_last=True, held=held)


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (4, 2), (8, 3)])
def test_every_tensor_is_written_once_in_order_and_all_ranks_write_about_as_much(ranks, replicas):
    stage = stage_of(ranks)
    shapes = dict(llama.FAMILY.tensors(stage.untied, "policy"))
    layer = sum(math.prod(weight.shape(stage.untied)) for weight in llama.FAMILY.layer)
    written, load, ends = Counter(), Counter(), {}
    for replica in range(replicas):
        for pieces in plan(stage, replica=replica, replicas=replicas):
            received = Counter()
            for piece in pieces:
                assert all(shapes[name] == shape for name, shape in piece.tensors.items())
                size = math.prod(piece.shape)
                received[piece.writer] += size
                load[replica, piece.writer] += size
                if len(piece.tensors) == 1:
                    [name] = piece.tensors
                    start = ends.get(name, piece.rows[0])
                    assert piece.rows[0] == start, f"{name}: rows {start} on come later"
                    ends[name] = piece.rows[1]
                    written[name] += size
                else:
                    written.update({name: math.prod(shape) for name, shape in piece.tensors.items()})
            assert max(received.values()) <= layer
    assert written == {name: math.prod(shape) for name, shape in shapes.items()}
    assert max(load.values()) <= sum(load.values()) / (ranks * replicas) + max(written.values())


def test_a_weight_that_no_rank_has_whole_is_noticed():
    stage = stage_of(2)
    held = [set(parts) for parts in stage.held]
    held[1] = {part for part in held[1] if part.key != "decoder.layers.3.mlp.linear_fc1.weight"}
    with pytest.raises(AssertionError, match=r"every element of decoder.layers.3.mlp.linear_fc1.weight once"):
        plan(dataclasses.replace(stage, held=held), replica=0, replicas=1)


def test_a_weight_that_exists_only_in_fp8_is_written_as_the_values_that_it_represents(
    write_hf, load, single, tmp_path, monkeypatch
):
    """A weight with a scale stands in for Transformer Engine's tensor."""
    source = write_hf(tie_word_embeddings=True)
    model, chunk = load(source)
    quantised = [layer.mlp.linear_fc1.weight for layer in chunk.decoder.layers]
    for scale, weight in enumerate(quantised, 2):
        weight.dequantize = lambda weight=weight, scale=scale: weight.detach() * scale
    monkeypatch.setattr(fp8_weights, "is_float8tensor", lambda weight: any(weight is each for each in quantised))
    write_live([chunk], single, model, tmp_path, tokenizer=build_tokenizer("HuggingFaceTokenizer", source))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model-00001-of-00001.safetensors")
    scales = {f"model.layers.{i}.mlp.{part}_proj.weight": i + 2 for i in range(4) for part in ("gate", "up")}
    assert after.keys() == {*before, "lm_head.weight"}
    for name, values in before.items():
        assert torch.equal(after[name], values * scales.get(name, 1)), name
    assert all(any(weight is parameter for parameter in chunk.parameters()) for weight in quantised)


def test_a_family_whose_models_are_always_tied_is_refused_by_name(monkeypatch):
    always = dataclasses.replace(
        llama.FAMILY,
        name="Always tied",
        rules={**llama.FAMILY.rules, "untie_embeddings_and_output_weights": fixed(False)},
    )
    model = resolve(ModelConfig(**LLAMA_8B, hf_model_type="llama"), None, "the test")
    assert untied(dataclasses.replace(model, untie_embeddings_and_output_weights=False)) == (model, llama.FAMILY)
    monkeypatch.setattr(registry, "FAMILIES", (always,))
    with pytest.raises(ConfigError, match="Always tied cannot have untie_embeddings_and_output_weights=True"):
        untied(dataclasses.replace(model, untie_embeddings_and_output_weights=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_reads_what_was_written_in_pieces(dtype, tmp_path):
    values = {"a": torch.randn(5, 3), "b": torch.randn(7), "c": torch.randn(4, 6).t()}
    path = tmp_path / "some.safetensors"
    file = SafetensorsWriter(path, {name: tuple(tensor.shape) for name, tensor in values.items()}, dtype)
    for piece in (values["a"][:2], values["a"][2:], values["b"], values["c"]):
        file.write(piece)
    file.close()
    found = load_file(path)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in values.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert path.stat().st_size == 8 + int.from_bytes(path.read_bytes()[:8], "little") + 46 * dtype.itemsize
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
