"""The comparison runs transformers' own model and ours, a part's weights in memory at a time, and finds differences."""

import json

import pytest
import torch
from helpers.hf_models import HF_MODELS, build_hf_model
from safetensors.torch import load_file

from megatron_brain.checkpointing import CheckpointSaver, TrainingState, read_info
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.conversion import read_hf_model, streamed_chunk, streamed_hf
from megatron_brain.conversion.compare import compare_with_hf
from megatron_brain.conversion.errors import MismatchError
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.conversion.streamed_hf import streamed_hf_model
from megatron_brain.conversion.weights import check_tensors
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.models.architecture import resolve

CPU = torch.device("cpu")


@pytest.fixture
def streamed():
    """A function that makes the streamed transformers model of a directory."""

    def make(directory):
        source = read_hf_model(directory)
        model = resolve(ModelConfig(), source.architecture, str(directory))
        files = SafetensorsReader(directory)
        names = check_tensors(files, source, model)
        return streamed_hf_model(source, files, names, torch.float32, CPU)

    return make


@pytest.fixture
def compare(single, tokenizer_dir, tmp_path, load):
    """A function that compares a directory with a checkpoint of a chunk that was loaded from it and then changed."""

    def run(directory, change=lambda weights: None, dtype=torch.float32):
        source = read_hf_model(directory)
        model, chunk = load(directory)
        with torch.no_grad():
            change(dict(chunk.named_parameters()))
        tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
        config = RunConfig(stage="sft", model=model)
        saver = CheckpointSaver(tmp_path / "saved", config, single, tokenizer, head=source.head)
        saver.save(0, [chunk], TrainingState())
        return compare_with_hf(source, read_info(tmp_path / "saved"), model, tokenizer, dtype, single)

    return run


@torch.no_grad()
def outputs(hf):
    tokens = torch.randint(2, 330, (4, 24), generator=torch.Generator().manual_seed(0))
    return hf(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("head", ["policy", "reward"])
@pytest.mark.parametrize("name", HF_MODELS)
def test_streamed_transformers_computes_what_transformers_does_bit_for_bit(name, head, write_hf, streamed):
    directory = write_hf(model=name, head=head)
    assert torch.equal(outputs(streamed(directory)), outputs(build_hf_model(name, head)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_streamed_transformers_holds_one_modules_weights(name, write_hf, streamed):
    """None before and after; in a call of a module, its own and no others."""
    hf = streamed(write_hf(model=name))
    seen = set()

    def held():
        return {path for path, parameter in hf.named_parameters() if not parameter.is_meta}

    def look(path):
        def hook(module, args):
            expected = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
            assert held() == expected
            seen.update(expected)

        return hook

    for path, module in hf.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(look(path))
    assert held() == set()
    outputs(hf)
    assert held() == set()
    assert seen == {path for path, _ in hf.named_parameters()}


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_our_model_holds_one_modules_weights_of_a_layer(head, write_hf, compare, monkeypatch):
    """And of the embedding the rows of the tokens that occur, of the output layer nothing."""
    made, held = [], []
    build = streamed_chunk.build_model

    def build_and_watch(*args, **options):
        chunks = build(*args, **options)
        made.extend(chunks)
        for path, module in chunks[0].decoder.layers.named_modules():
            own = {f"decoder.layers.{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
            if own:
                # A hook that comes before those that the module gets later, so it looks at its end.
                module.register_forward_hook(lambda module, args, output, own=own: held.append((own, in_memory())))
        return chunks

    def in_memory():
        return {name for name, p in made[0].named_parameters() if not p.is_meta and name.startswith("decoder.layers.")}

    monkeypatch.setattr(streamed_chunk, "build_model", build_and_watch)
    assert compare(write_hf(model="gpt2", head=head, tie_word_embeddings=False)).largest < 1e-5
    assert len(held) == 4 * 6
    assert all(own == present for own, present in held)
    assert in_memory() == set()
    parameters = dict(made[0].named_parameters())
    assert parameters["embedding.word_embeddings.weight"].size(0) < 330
    assert head == "reward" or parameters["output_layer.weight"].is_meta


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_is_multiplied_in_blocks(tied, write_hf, streamed, compare, monkeypatch):
    directory = write_hf(tie_word_embeddings=tied)
    monkeypatch.setattr(streamed_hf, "BLOCK_ELEMENTS", 100 * 32)
    monkeypatch.setattr(streamed_chunk, "BLOCK_ELEMENTS", 70 * 32)
    rows = []
    read = SafetensorsReader.rows
    monkeypatch.setattr(SafetensorsReader, "rows", lambda *args: rows.append(args[2:]) or read(*args))
    expected = outputs(build_hf_model("llama", tie_word_embeddings=tied))
    assert torch.allclose(outputs(streamed(directory)), expected, atol=1e-5)
    assert [block for block in rows if block[1] - block[0] > 1] == [(0, 100), (100, 200), (200, 300), (300, 330)]
    assert compare(directory).largest < 1e-5


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_right_conversions_agree(head, write_hf, compare):
    comparison = compare(write_hf(model="gpt2", head=head))
    assert comparison.what == {"policy": "logits", "reward": "rewards"}[head]
    assert comparison.largest < 1e-5
    assert list(comparison.hidden) == ["the embedding", *(f"layer {i}" for i in range(4)), "the final norm"]
    comparison.require(1e-5)


def test_both_are_rounded_to_the_written_type(write_hf, compare):
    directory = write_hf()
    rounded = compare(directory, dtype=torch.bfloat16)
    assert rounded.largest < 1e-5
    assert rounded.scale != compare(directory).scale


@pytest.mark.parametrize(
    ("model", "broken", "named"),
    [
        ("llama", "embedding.word_embeddings.weight", "the embedding"),
        ("gpt2", "embedding.position_embeddings.weight", "the embedding"),
        ("llama", "decoder.layers.0.self_attention.linear_qkv.weight", "layer 0"),
        ("llama", "decoder.layers.1.mlp.linear_fc2.weight", "layer 1"),
        ("gpt_neox", "decoder.layers.2.mlp.linear_fc1.bias", "layer 2"),
        ("llama", "decoder.layers.2.input_layernorm.weight", "layer 2"),
        ("llama", "decoder.final_layernorm.weight", "the final norm"),
        ("llama", "output_layer.weight", "hidden states agree everywhere"),
    ],
)
def test_a_broken_weight_is_found_and_its_layer_named(model, broken, named, write_hf, compare):
    def change(weights):
        weights[broken][:32] = weights[broken][:32].roll(1, dims=0)

    comparison = compare(write_hf(model=model, tie_word_embeddings=False), change)
    assert comparison.largest > 1e-2
    assert comparison.first_difference.startswith(named)
    with pytest.raises(MismatchError, match="the logits differ by up to"):
        comparison.require(1e-3)


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_not_a_number_is_a_difference(head, write_hf, compare):
    comparison = compare(
        write_hf(head=head), lambda weights: weights["decoder.layers.1.mlp.linear_fc2.weight"].fill_(torch.nan)
    )
    with pytest.raises(MismatchError, match="layer 1 is the first"):
        comparison.require(1e30)


def test_a_row_of_the_last_block_alone_is_found(write_hf, compare, monkeypatch):
    monkeypatch.setattr(streamed_chunk, "BLOCK_ELEMENTS", 100 * 32)
    directory = write_hf(tie_word_embeddings=False)
    comparison = compare(directory, lambda weights: weights["output_layer.weight"][329].mul_(1.1))
    assert comparison.largest > 1e-3


def test_padding_of_a_reward_model_is_read_as_padding(write_hf, compare):
    """Where config.json names no padding, the tokenizer's is taken; the rows are of different lengths."""
    directory = write_hf(head="reward")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    assert compare(directory).largest < 1e-5


def test_nothing_of_a_file_stays_mapped_that_was_read(write_hf):
    directory = write_hf()
    files = SafetensorsReader(directory)
    tensors = [files.read(name) for name in files.file_of]

    def mapped():
        return str(directory / "model.safetensors") in open("/proc/self/maps").read()

    assert mapped()
    assert all(torch.equal(a, b) for a, b in zip(tensors, load_file(directory / "model.safetensors").values()))
    del tensors
    files.rows("lm_head.weight", 3, 5)
    assert not mapped()
