"""Conversion file by file: the same as through a model, in files of a chosen size, whole or not there."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml
from helpers.hf_models import build_hf_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from megatron_brain.checkpointing import CheckpointSaver, TrainingState, read_info
from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.folders import list_files
from megatron_brain.checkpointing.index import write_index
from megatron_brain.checkpointing.storage import read_tensors, write_file
from megatron_brain.config.data import TokenizerConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.conversion import to_checkpoint, to_hf
from megatron_brain.conversion.output_folder import verified_folder
from megatron_brain.conversion.safetensors_files import INDEX, SafetensorsReader
from megatron_brain.conversion.to_checkpoint import ToCheckpoint
from megatron_brain.conversion.to_hf import ToHF
from megatron_brain.conversion.workers import ConversionError, Workers
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.errors import ConfigError


@pytest.fixture
def workers(single):
    return Workers()


def nothing(amount):
    """Takes progress and shows none."""


@pytest.fixture
def convert_in(workers, tmp_path):
    """A function that converts a directory to a checkpoint and returns its folder."""

    def convert(directory, *, bf16=False, name="checkpoint"):
        tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))
        with verified_folder(tmp_path / name, workers) as folder:
            ToCheckpoint(directory, bf16=bf16, tokenizer=tokenizer).write(folder, workers, nothing)
        return tmp_path / name

    return convert


@pytest.fixture
def convert_out(workers, tmp_path):
    """A function that converts a checkpoint to a Hugging Face directory and returns it."""

    def convert(load, *, dtype=None, max_shard_size="5GB", hf_model_type=None, name="out"):
        with verified_folder(tmp_path / name, workers) as folder:
            conversion = ToHF(load, dtype=dtype, max_shard_size=max_shard_size, hf_model_type=hf_model_type)
            conversion.write(folder, workers, nothing)
        return tmp_path / name

    return convert


def expect_equal(before, after):
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        assert torch.equal(before[key], after[key]), key


def all_tensors(directory):
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("model", "head", "bf16"),
    [("llama", "policy", False), ("gpt2", "policy", True), ("phi3", "reward", False), ("gpt_neox", "reward", True)],
)
def test_a_checkpoint_is_the_one_that_a_model_saves(model, head, bf16, write_hf, load, single, convert_in, tmp_path):
    source = write_hf(model=model, head=head)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    ours = read_info(convert_in(source, bf16=bf16)).path

    config, chunk = load(source, bf16=bf16, hf_model=str(source))
    tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(source))
    run = RunConfig(stage="sft" if head == "policy" else "reward", model=config, tokenizer=tokenizer)
    saver = CheckpointSaver(
        tmp_path / "saved",
        run,
        single,
        build_tokenizer(tokenizer.tokenizer_type, source),
        head=head,
        generation_config={"temperature": 0.6},
    )
    saver.save(0, [chunk], TrainingState())
    theirs = read_info(tmp_path / "saved").path

    expect_equal(read_tensors(theirs), read_tensors(ours))
    assert read_info(ours.parent).generation_config == {"temperature": 0.6}
    for name in ("config.yaml", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        assert yaml.safe_load((ours / name).read_text()) == yaml.safe_load((theirs / name).read_text()), name
    # Which file a tensor is in may differ, and with it the checksum of the list of tensors.
    infos = [dataclasses.replace(read_info(path), path=ours, files={}) for path in (ours, theirs)]
    assert infos[0] == infos[1]
    assert [path.name for path in sorted(ours.iterdir())] == [path.name for path in sorted(theirs.iterdir())]


def test_files_are_no_larger_than_those_read_and_each_tensor_is_read_once(write_hf, convert_in, tmp_path, monkeypatch):
    plain = convert_in(write_hf(tie_word_embeddings=False), name="plain")
    build_hf_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "hf", max_shard_size="45KB")
    (tmp_path / "hf" / "model.safetensors").unlink()
    read = Counter()
    original = SafetensorsReader.read
    monkeypatch.setattr(SafetensorsReader, "read", lambda self, name: read.update([name]) or original(self, name))
    sharded = convert_in(tmp_path / "hf", name="sharded")
    files = sorted(read_info(sharded).path.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert max(path.stat().st_size for path in files) <= largest
    assert set(read.values()) == {1}
    expect_equal(read_tensors(read_info(plain).path), read_tensors(read_info(sharded).path))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("size", ["5GB", "45KB", "10KB"])
def test_shards_are_written_as_transformers_reads_them(model, size, write_hf, convert_in, convert_out):
    """10 KB: parts of one fused weight are in two shards, and tensors that are larger have shards of their own."""
    source = write_hf(model=model, tie_word_embeddings=True)
    out = convert_out(convert_in(source), max_shard_size=size)
    expect_equal(load_file(source / "model.safetensors"), all_tensors(out))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if size == "5GB":
        assert files == ["model.safetensors"]
        assert not (out / INDEX).exists()
    else:
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        shards = [[tensor.nbytes for tensor in load_file(out / name).values()] for name in files]
        assert all(sum(shard) <= int(size[:-2]) * 1000 or len(shard) == 1 for shard in shards)
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, shards))
        assert all(key in load_file(out / name) for key, name in index["weight_map"].items())
    tokens = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        expected = build_hf_model(model, tie_word_embeddings=True)(tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(tokens).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_stored_in_other_pieces_is_exported_alike(dtype, write_hf, convert_in, convert_out):
    """As at a layout where weights are cut: here each in two, along its last dimension."""
    source = write_hf()
    checkpoint = convert_in(source)
    folder = read_info(checkpoint).path
    boxes = []
    for key, tensor in read_tensors(folder).items():
        half = tensor.size(-1) // 2
        for start, data in ((0, tensor[..., :half]), (half, tensor[..., half:])):
            offset = (*(0 for _ in tensor.shape[1:]), start)
            boxes.append(Box(key=key, shape=tuple(tensor.shape), offset=offset, data=data))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_index(folder, write_file(boxes, folder / "cut.safetensors"))
    dataclasses.replace(read_info(folder), files=list_files(folder)).write(folder)
    before = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    expect_equal(before, all_tensors(convert_out(checkpoint, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once_to_the_chosen_type(dtype, write_hf, convert_in, convert_out):
    source = write_hf()
    out = convert_out(convert_in(source), dtype=dtype)
    before = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    expect_equal(before, all_tensors(out))
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_a_size_that_cannot_be_read_is_a_mistake(write_hf, convert_in, convert_out):
    checkpoint = convert_in(write_hf())
    with pytest.raises(ConfigError, match="5 elephants"):
        convert_out(checkpoint, max_shard_size="5 elephants")


def test_the_family_is_the_one_it_came_from_or_chosen(write_hf, convert_in, convert_out):
    checkpoint = convert_in(write_hf(model="mistral", sliding_window=None, head_dim=8))
    assert json.loads((convert_out(checkpoint, name="kept") / "config.json").read_text())["model_type"] == "mistral"
    chosen = convert_out(checkpoint, name="chosen", hf_model_type="llama")
    assert json.loads((chosen / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(ConfigError, match="GPT-2"):
        convert_out(checkpoint, name="impossible", hf_model_type="gpt2")


@pytest.mark.parametrize(
    ("original", "ends"),
    [({}, 1), ({"eos_token_id": 1}, 1), ({"eos_token_id": 7}, [1, 7]), ({"eos_token_id": [7, 1, 9]}, [1, 7, 9])],
)
def test_generation_config_is_kept_and_ends_at_our_end_of_text(original, ends, write_hf, convert_in, convert_out):
    source = write_hf()
    kept = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "pad_token_id": 9}
    (source / "generation_config.json").write_text(json.dumps({**kept, **original}))
    settings = GenerationConfig.from_pretrained(convert_out(convert_in(source)))
    assert (settings.temperature, settings.top_p, settings.do_sample) == (0.6, 0.9, True)
    assert (settings.eos_token_id, settings.pad_token_id) == (ends, 0)


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
def test_a_text_classification_pipeline_returns_our_rewards(model, write_hf, load, convert_in, convert_out):
    """Of texts of different lengths in one padded batch, against our own model on the ids that training has."""
    source = write_hf(model=model, head="reward")
    out = convert_out(convert_in(source))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", source)
    texts = [("package 1: a small tool\nTL;DR:", " tool small"), ("a", " file"), ("a fast network server", "")]
    groups = [
        Group(prompt=tuple(tokenizer.encode_prompt(prompt)), responses=(tuple(tokenizer.encode_response(response)),))
        for prompt, response in texts
    ]
    _, chunk = load(source)
    with torch.no_grad():
        expected = chunk(pack_groups(groups, shared_prefix=False)).tolist()
    classify = pipeline("text-classification", model=str(out), tokenizer=str(out), function_to_apply="none")
    ends = AutoTokenizer.from_pretrained(out).eos_token
    given = classify([prompt + response + ends for prompt, response in texts], batch_size=3)
    assert len({group.num_tokens(shared_prefix=False) for group in groups}) == 3
    assert [row["score"] for row in given] == pytest.approx(expected, abs=1e-5)
    assert {row["label"] for row in given} == {"reward"}
    # The problem type says regression, for which a pipeline applies no function by itself.
    alone = pipeline("text-classification", model=str(out), tokenizer=str(out))
    assert alone("".join(texts[0]) + ends)[0]["score"] == pytest.approx(expected[0], abs=1e-5)


def test_exported_reward_is_read_at_the_end_of_text_where_the_tokenizer_pads_with_it(
    write_hf, tokenizer_dir, convert_in, convert_out
):
    """Many say that padding is the end of text; the exported pair must not."""
    hf_tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    hf_tokenizer.pad_token = hf_tokenizer.eos_token
    hf_tokenizer.add_special_tokens({"unk_token": "<pad>"})
    source = write_hf(head="reward")
    hf_tokenizer.save_pretrained(source)
    out = convert_out(convert_in(source))
    config = json.loads((out / "config.json").read_text())
    reader = AutoTokenizer.from_pretrained(out)
    assert config["pad_token_id"] == reader.pad_token_id != config["eos_token_id"]
    assert (reader.padding_side, reader.truncation_side) == ("right", "left")


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_full_disk_leaves_nothing_under_the_final_name(
    direction, write_hf, convert_in, convert_out, tmp_path, monkeypatch
):
    source = write_hf()
    checkpoint = convert_in(source) if direction == "out" else None

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((to_hf, "write_safetensors") if direction == "out" else (to_checkpoint, "write_file")), full)
    convert, given = (convert_out, checkpoint) if direction == "out" else (convert_in, source)
    with pytest.raises(ConversionError, match="No space left on device"):
        convert(given, name="final")
    assert not (tmp_path / "final").exists()
    unverified = tmp_path / "final.unverified"
    assert not (unverified / "config.json").exists()
    assert not (unverified / "latest_checkpointed_iteration.txt").exists()
    monkeypatch.undo()
    convert(given, name="final")
    assert not unverified.exists()


KILLED = """
import os, signal, sys
from megatron_brain.conversion import to_hf
write = to_hf.write_safetensors
def write_two(tensors, path, **options):
    if "00003-of" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, **options)
to_hf.write_safetensors = write_two
from megatron_brain.commands import convert_megatron_to_hf
convert_megatron_to_hf.main(sys.argv[1:])
"""


def test_a_killed_conversion_leaves_nothing_under_the_final_name(write_hf, convert_in, convert_out, tmp_path):
    checkpoint = convert_in(write_hf())
    command = [sys.executable, "-c", KILLED, "--load", checkpoint, "--save", tmp_path / "final"]
    died = subprocess.run([*command, "--max-shard-size", "20KB"], capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "final").exists()
    left = os.listdir(tmp_path / "final.unverified")
    assert {"model-00001-of-00009.safetensors", "model-00002-of-00009.safetensors"} < set(left)
    assert not {"model-00003-of-00009.safetensors", "config.json"} & set(left)
    assert convert_out(checkpoint, max_shard_size="20KB", name="final").is_dir()
    assert not (tmp_path / "final.unverified").exists()
