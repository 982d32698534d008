"""Hugging Face folders as people have them: tied output layers that an index lists, and adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_brain.conversion import read_hf_model
from megatron_brain.errors import ConfigError

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def shard(directory, listed, *, stored=()):
    """Two files and their index, which lists `listed` beside what is there."""
    tensors = {**load_file(directory / "model.safetensors"), **dict(stored)}
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of_file in parts.items():
        save_file({name: tensors[name] for name in of_file}, directory / file, {"format": "pt"})
    places = {name: file for file, of_file in parts.items() for name in of_file} | listed
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("number", [1, 2])
def test_a_tied_output_layer_that_only_the_index_lists_is_the_embedding(number, write_hf, load):
    """As transformers reads it."""
    directory = write_hf(tie_word_embeddings=True)
    tensors = shard(directory, {OUTPUT: f"model-0000{number}-of-00002.safetensors"})
    assert OUTPUT not in tensors
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model, chunk = load(directory)
    assert not model.untie_embeddings_and_output_weights
    rows = len(tensors[EMBEDDING])
    assert torch.equal(chunk.output_weight[:rows], tensors[EMBEDDING])
    assert torch.equal(theirs.lm_head.weight, tensors[EMBEDDING])


def test_an_output_layer_that_is_not_tied_must_be_there(write_hf, load):
    directory = write_hf(tie_word_embeddings=False)
    tensors = load_file(directory / "model.safetensors")
    output = tensors.pop(OUTPUT)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    shard(directory, {OUTPUT: "model-00001-of-00002.safetensors"})
    with pytest.raises(ConfigError, match=OUTPUT):
        load(directory)
    assert output.shape == tensors[EMBEDDING].shape


def test_a_tied_output_layer_with_values_of_its_own_is_refused(write_hf, load):
    directory = write_hf(tie_word_embeddings=True)
    other = load_file(directory / "model.safetensors")[EMBEDDING] + 1
    shard(directory, {}, stored={OUTPUT: other}.items())
    with pytest.raises(ConfigError, match=f"{OUTPUT}.*tie"):
        load(directory)


@pytest.mark.parametrize("weights", [True, False])
def test_a_folder_with_an_adapter_is_refused_with_the_way_to_merge_it(weights, write_hf):
    directory = write_hf()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    if not weights:  # An adapter alone, which has no config.json.
        (directory / "model.safetensors").unlink()
        (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match="has an adapter_config.json: .*merge_and_unload.*or remove"):
        read_hf_model(directory)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_file_and_tensor(value, write_hf, load):
    directory = write_hf()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 4] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match="model.safetensors: model.layers.1.self_attn.v_proj.weight holds values that"
    ):
        load(directory)
