"""Weights go in and come back bit-equal, and both models compute the same on the way."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_brain.config.errors import ConfigError
from megatron_brain.conversion import export_hf, load_hf_weights
from megatron_brain.conversion.compare import compare_with_hf
from megatron_brain.conversion.safetensors_files import INDEX, SafetensorsReader, SafetensorsWriter
from megatron_brain.data.tokenizer import build_tokenizer

VARIANTS = {
    "tied_gqa": {"tie_word_embeddings": True},
    "untied_mha": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 12, "tie_word_embeddings": True},
    "rope_base_and_epsilon": {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}, "rms_norm_eps": 0.1},
}


@pytest.fixture
def tokenizer(tokenizer_dir):
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)


def rewrite(directory, change):
    """Apply a function to the tensors of a directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", VARIANTS)
def test_policy_goes_in_and_comes_back(name, write_hf, load, tokenizer, single, tmp_path):
    source = write_hf(**VARIANTS[name])
    model, chunk = load(source)
    assert compare_with_hf(source, chunk, model, "policy", tokenizer, torch.float32).largest < 1e-5
    export_hf(tmp_path / "out", [chunk], model, "policy", tokenizer, torch.float32, single)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    tokens = torch.arange(2, 42).reshape(2, 20)
    logits = [AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (source, tmp_path / "out")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "head_dim": 12}])
def test_reward_model_goes_in_and_comes_back(changes, write_hf, load, tokenizer, single, tmp_path):
    source = write_hf(head="reward", **changes)
    model, chunk = load(source)
    comparison = compare_with_hf(source, chunk, model, "reward", tokenizer, torch.float32)
    assert comparison.what == "rewards"
    assert comparison.largest < 1e-5
    export_hf(tmp_path / "out", [chunk], model, "reward", tokenizer, torch.float32, single)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_exported_reward_is_read_at_the_end_of_text_of_a_padded_row(write_hf, load, tokenizer_dir, single, tmp_path):
    """The tokenizer says that padding is the end of text, as many do; the exported pair must not."""
    hf_tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    hf_tokenizer.pad_token = hf_tokenizer.eos_token
    hf_tokenizer.add_special_tokens({"unk_token": "<pad>"})
    hf_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer")
    model, chunk = load(write_hf(head="reward"))
    export_hf(tmp_path / "out", [chunk], model, "reward", tokenizer, torch.float32, single)

    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.config.num_labels == 1
    assert exported.config.pad_token_id == reader.pad_token_id != exported.config.eos_token_id
    texts = ["a small fast editor</s>", "file</s>"]
    batch = reader(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = exported(**batch).logits[:, 0]
        hidden = exported.model(**batch).last_hidden_state
    ends = (batch["input_ids"] == tokenizer.eos_id).long()
    assert ends.sum(1).tolist() == [1, 1]
    expected = exported.score(hidden[torch.arange(2), ends.argmax(1)])[:, 0]
    assert ends.argmax(1).tolist()[1] < batch["input_ids"].size(1) - 1
    assert torch.allclose(together, expected)


def test_a_tokenizer_that_can_only_pad_with_its_end_of_text_is_warned_of(
    write_hf, load, tokenizer_dir, single, tmp_path, caplog
):
    settings = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] == "</s>"]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(settings))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer")
    model, chunk = load(write_hf(head="reward"))
    export_hf(tmp_path / "out", [chunk], model, "reward", tokenizer, torch.float32, single)
    assert "the tokenizer pads with </s>" in caplog.text


def test_a_reward_model_starts_from_a_language_model_with_a_head_of_its_own(write_hf, load, tokenizer):
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


def test_vocabulary_padding_is_zero_and_is_not_exported(write_hf, load, tokenizer, single, tmp_path):
    source = write_hf(tie_word_embeddings=False)
    model, chunk = load(source)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(1.0)
    load_hf_weights(source, [chunk], model, "policy")
    for weight in (chunk.embedding.word_embeddings.weight, chunk.output_layer.weight):
        assert weight.size(0) == 384
        assert not weight[330:].any()
    export_hf(tmp_path / "out", [chunk], model, "policy", tokenizer, torch.float32, single)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].size(0) == 330


@pytest.mark.parametrize("bf16", [False, True])
def test_bfloat16_is_written_rounded_and_read_by_transformers_as_such(
    bf16, write_hf, load, tokenizer, single, tmp_path
):
    source = write_hf()
    model, chunk = load(source, bf16=bf16)
    export_hf(tmp_path / "out", [chunk], model, "policy", tokenizer, torch.bfloat16, single)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)
    comparison = compare_with_hf(tmp_path / "out", chunk, model, "policy", tokenizer, torch.bfloat16)
    assert comparison.largest < 1e-5


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("embedding.word_embeddings.weight", "the embedding"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "layer 0"),
        ("decoder.layers.1.mlp.linear_fc2.weight", "layer 1"),
        ("decoder.layers.2.input_layernorm.weight", "layer 2"),
        ("decoder.final_layernorm.weight", "the final norm"),
        ("output_layer.weight", "hidden states agree everywhere"),
    ],
)
def test_a_broken_weight_is_found_and_its_layer_named(broken, named, write_hf, load, tokenizer):
    source = write_hf(tie_word_embeddings=False)
    model, chunk = load(source)
    with torch.no_grad():
        weight = dict(chunk.named_parameters())[broken]
        weight[:330] = weight[:330].roll(1, dims=0)
    comparison = compare_with_hf(source, chunk, model, "policy", tokenizer, torch.float32)
    assert comparison.largest > 1e-2
    assert comparison.first_difference.startswith(named)


def test_not_a_number_is_a_difference(write_hf, load, tokenizer):
    source = write_hf()
    model, chunk = load(source)
    with torch.no_grad():
        chunk.decoder.layers[1].mlp.linear_fc2.weight.fill_(torch.nan)
    comparison = compare_with_hf(source, chunk, model, "policy", tokenizer, torch.float32)
    with pytest.raises(Exception, match="layer 1 is the first"):
        comparison.require(1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks 1 of the 29 .*layers\.1\.mlp\.up_proj"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            r"does not have: .*q_proj\.bias",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model\.norm\.weight has shape \[31\].* \[32\]"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(330, 32)}), "tie_word_embeddings=true, but lm_head"),
    ],
)
def test_files_that_do_not_fit_their_config_are_refused_by_tensor(change, message, write_hf, load):
    source = write_hf(tie_word_embeddings=True)
    rewrite(source, change)
    with pytest.raises(ConfigError, match=message):
        load(source)


def test_a_repeated_tied_output_and_old_rotary_buffers_are_no_mistake(write_hf, load):
    source = write_hf(tie_word_embeddings=True)
    _, plain = load(source)

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(source, repeat)
    _, repeated = load(source)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), repeated.parameters(), strict=True))


def test_a_model_of_other_sizes_is_refused(write_hf, load):
    wide, narrow = write_hf("wide"), write_hf("narrow", intermediate_size=40)
    model, chunk = load(wide)
    with pytest.raises(ConfigError, match=r"gate_proj\.weight has shape \[40, 32\].* \[48, 32\]"):
        load_hf_weights(narrow, [chunk], model, "policy")


def test_shards_and_index_are_written_as_transformers_reads_them(tmp_path):
    writer = SafetensorsWriter(tmp_path, max_shard_bytes=100)
    tensors = {f"t{i}": torch.full((i + 1, 4), float(i)) for i in range(8)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(set(index["weight_map"].values())) > 1
    with SafetensorsReader(tmp_path) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    (tmp_path / index["weight_map"]["t0"]).unlink()
    with pytest.raises(ConfigError, match="names files that are not there"):
        SafetensorsReader(tmp_path)


def test_directories_without_whole_safetensors_are_refused(write_hf, load):
    source = write_hf()
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        load(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="only safetensors weights are read"):
        load(source)


def test_export_refuses_a_directory_in_use_and_a_tokenizer_too_large(write_hf, load, tokenizer, single, tmp_path):
    model, chunk = load(write_hf(vocab_size=300))
    with pytest.raises(ValueError, match="needs a vocabulary of 320"):
        export_hf(tmp_path / "out", [chunk], model, "policy", tokenizer, torch.float32, single)
    model, chunk = load(write_hf("other"))
    with pytest.raises(ConfigError, match="not empty"):
        export_hf(tmp_path / "hf", [chunk], model, "policy", tokenizer, torch.float32, single)
