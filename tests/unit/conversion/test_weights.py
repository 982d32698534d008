"""Weights of a Hugging Face directory in a model: what is not in the files, and files that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_brain.conversion import load_hf_weights
from megatron_brain.conversion.safetensors_files import INDEX, SafetensorsReader
from megatron_brain.errors import ConfigError


def rewrite(directory, change):
    """Apply a function to the tensors of a directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_reward_model_starts_from_a_language_model_with_a_head_of_its_own(write_hf, load):
    source = write_hf(tie_word_embeddings=False)
    _, reward = load(source, head="reward")
    _, policy = load(source)
    ours, theirs = dict(reward.named_parameters()), dict(policy.named_parameters())
    assert ours.keys() - theirs.keys() == {"reward_head.weight"}
    assert ours["reward_head.weight"].abs().sum() > 0
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())


def test_a_policy_is_not_made_of_a_classifier(write_hf, load):
    with pytest.raises(ConfigError, match="is a reward model"):
        load(write_hf(head="reward"), head="policy")


def test_vocabulary_padding_is_zero(write_hf, load):
    source = write_hf(tie_word_embeddings=False)
    model, chunk = load(source)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(1.0)
    load_hf_weights(source, [chunk], model, "policy")
    for weight in (chunk.embedding.word_embeddings.weight, chunk.output_layer.weight):
        assert weight.size(0) == 384
        assert not weight[330:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks 1 of the \d+ .*layers\.1\.mlp\.up_proj"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            r"does not have: .*q_proj\.bias",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model\.norm\.weight has shape \[31\].* \[32\]"),
    ],
)
def test_files_that_do_not_fit_their_config_are_refused_by_tensor(change, message, write_hf, load):
    source = write_hf(tie_word_embeddings=True)
    rewrite(source, change)
    with pytest.raises(ConfigError, match=message):
        load(source)


def test_a_model_of_other_sizes_is_refused(write_hf, load):
    wide, narrow = write_hf("wide"), write_hf("narrow", intermediate_size=40)
    model, chunk = load(wide)
    with pytest.raises(ConfigError, match=r"gate_proj\.weight has shape \[40, 32\].* \[48, 32\]"):
        load_hf_weights(narrow, [chunk], model, "policy")


def test_directories_without_whole_safetensors_are_refused(write_hf, load):
    source = write_hf()
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        load(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="only safetensors weights are read"):
        load(source)


def test_an_index_that_does_not_say_what_the_files_hold_is_refused(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")

    def open_with(**weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return SafetensorsReader(tmp_path)

    assert open_with(a="one.safetensors").read("a").tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"names files that are not there: two\.safetensors"):
        open_with(a="one.safetensors", b="two.safetensors")
    with pytest.raises(ConfigError, match=r"one\.safetensors has no b"):
        open_with(b="one.safetensors").shape("b")
    for elsewhere in ("../one.safetensors", str(tmp_path / "one.safetensors")):
        with pytest.raises(ConfigError, match=r"names .*one\.safetensors, which is no file of this directory"):
            open_with(a=elsewhere)
    with pytest.raises(ConfigError, match="is not the index of a model's files"):
        open_with(a=3)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ConfigError, match="is not the index of a model's files"):
        SafetensorsReader(tmp_path)


def test_beside_one_whole_file_the_index_of_others_is_not_read(write_hf, load):
    """As of a model that was saved again in another size of shards: transformers takes the one file."""
    source, name = write_hf(), "model.norm.weight"
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: tensors[name] + 1}, source / "old.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "old.safetensors")}))
    _, chunk = load(source)
    theirs = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(chunk.decoder.final_layernorm.weight, theirs.model.norm.weight)
    assert torch.equal(chunk.decoder.final_layernorm.weight, tensors[name])


@pytest.mark.parametrize(("dtype", "called"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_weights_of_a_quantised_type_are_refused(dtype, called, write_hf, load):
    source, name = write_hf(), "model.layers.0.mlp.up_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ConfigError, match=f"{name} is {called}"):
        load(source)
