"""A tiny random model of every Hugging Face family computes the same here, and its weights come back bit-equal."""

import weakref

import pytest
import torch
from helpers.hf_models import HF_MODELS, build_hf_model
from safetensors.torch import load_file, save_file

from megatron_brain.checkpointing.state import model_boxes
from megatron_brain.config.model import ModelConfig
from megatron_brain.conversion import read_hf_model
from megatron_brain.conversion.fusion import GATE_UP, QKV, STACKED_QKV, TRANSPOSED, TRANSPOSED_STACKED_QKV
from megatron_brain.conversion.registry import FAMILIES
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.conversion.weights import hf_tensors
from megatron_brain.data.groups import Group, pack_groups
from megatron_brain.errors import ConfigError
from megatron_brain.models.attention import PackedLayout
from megatron_brain.models.logprobs import local_logits

LENGTH = 24


def random_tokens():
    """`[4, LENGTH]` of any tokens but padding (0), ending in EOS (1)."""
    tokens = torch.randint(2, 330, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 1
    return tokens


def packed(tokens):
    groups = [Group(prompt=(row[0],), responses=(tuple(row[1:]),)) for row in tokens.tolist()]
    return pack_groups(groups, shared_prefix=False)


@torch.no_grad()
def logits(chunk, tokens):
    """`[4, LENGTH, V]` float32."""
    batch = packed(tokens)
    hidden = chunk.trunk(batch.tokens, batch.position_ids, PackedLayout(segments=batch.segments))
    vocab = chunk.true_vocab_size
    every = local_logits(hidden[:, 0], chunk.output_weight, first_id=0, vocab_size=vocab)[:, :vocab]
    return every.float().view(*tokens.shape, vocab)


@torch.no_grad()
def hf_logits(model, tokens):
    return model(input_ids=tokens).logits.float()


def expect_equal_tensors(chunk, model, head, source):
    before = load_file(source / "model.safetensors")
    after = dict(hf_tensors(chunk, model, head, read_hf_model(source).family))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def largest(difference):
    return difference.abs().max().item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", HF_MODELS)
def test_policy_has_the_logits_of_transformers_and_its_tensors_come_back(name, tied, write_hf, load):
    source = write_hf(model=name, tie_word_embeddings=tied)
    model, chunk = load(source)
    tokens = random_tokens()
    theirs = hf_logits(build_hf_model(name, tie_word_embeddings=tied), tokens)
    assert theirs.abs().max() > 1
    assert largest(logits(chunk, tokens) - theirs) < 1e-5
    expect_equal_tensors(chunk, model, "policy", source)


@pytest.mark.parametrize("name", HF_MODELS)
def test_policy_in_bfloat16_is_as_near_to_the_exact_logits_as_transformers_is(name, write_hf, load):
    # At logits below 1. bfloat16 has three digits, so larger ones differ by more.
    source = write_hf(model=name, std=0.03)
    _, chunk = load(source, bf16=True)
    tokens = random_tokens()
    hf = build_hf_model(name, std=0.03).bfloat16()
    theirs, exact, ours = hf_logits(hf, tokens), hf_logits(hf.float(), tokens), logits(chunk, tokens)
    assert largest(ours - theirs) < 2e-2
    assert largest(ours - exact) < 2 * largest(theirs - exact)


@pytest.mark.parametrize("name", HF_MODELS)
def test_reward_model_has_the_rewards_of_transformers_and_its_tensors_come_back(name, write_hf, load):
    source = write_hf(model=name, head="reward")
    model, chunk = load(source)
    tokens = random_tokens()
    theirs = hf_logits(build_hf_model(name, "reward"), tokens)[:, 0]
    with torch.no_grad():
        ours = chunk(packed(tokens))
    assert theirs.abs().max() > 0.1
    assert largest(ours - theirs) < 1e-5
    expect_equal_tensors(chunk, model, "reward", source)


def rewrite(directory, change):
    tensors = change(load_file(directory / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


BUFFERS = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.0.attn.masked_bias": torch.ones(())},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.ones(()),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    },
}


@pytest.mark.parametrize("name", HF_MODELS)
def test_files_of_the_base_model_a_repeated_tied_output_and_buffers_are_read_as_the_model(name, write_hf, load):
    """The hub's GPT-2 has names without the prefix of the base model and causal masks among its weights."""
    source = write_hf(model=name, tie_word_embeddings=True)
    family = read_hf_model(source).family
    _, plain = load(source)
    output, embedding = family.output.sources[0].name, family.embedding[0].sources[0].name

    def as_on_the_hub(tensors):
        repeated = {output: tensors[embedding].clone(), **BUFFERS.get(name, {}), **tensors}
        return {key.removeprefix(family.prefix): tensor for key, tensor in repeated.items()}

    rewrite(source, as_on_the_hub)
    _, loaded = load(source)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("name", HF_MODELS)
def test_a_repeated_tied_output_that_differs_is_refused(name, write_hf, load):
    source = write_hf(model=name, tie_word_embeddings=True)
    family = read_hf_model(source).family
    output, embedding = family.output.sources[0].name, family.embedding[0].sources[0].name
    rewrite(source, lambda tensors: {**tensors, output: tensors[embedding] + 1})
    with pytest.raises(ConfigError, match=f"tie_word_embeddings=true, but {output} differs"):
        load(source)


def test_a_bias_of_gpt2_that_the_model_does_not_have_is_not_taken_for_a_mask(write_hf, load):
    source = write_hf(model="gpt2")
    extra = "transformer.h.4.attn.c_attn.bias"
    rewrite(source, lambda tensors: {**tensors, extra: torch.zeros(96)})
    with pytest.raises(ConfigError, match=f"does not have: {extra}"):
        load(source)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("head", ["policy", "reward"])
def test_every_weight_of_the_network_is_in_the_table_with_its_shape(family, head, write_hf, load):
    """Of the checkpoint: keys and shapes of the table are those of the weights that the network has."""
    model, chunk = load(write_hf(model=family.model_type, head=head))
    expected = {weight.key(layer): weight.shape(model) for weight, layer in family.entries(model, head)}
    assert {box.key: tuple(box.shape) for box in model_boxes([chunk])} == expected


def test_loading_holds_the_tensors_of_one_weight_at_a_time(write_hf, load, monkeypatch):
    source = write_hf(model="llama")
    read, held, most = SafetensorsReader.read, [], []

    def counted(files, name):
        tensor = read(files, name)
        held.append(weakref.ref(tensor))
        most.append(sum(tensor() is not None for tensor in held))
        return tensor

    monkeypatch.setattr(SafetensorsReader, "read", counted)
    load(source)
    assert len(held) == 4 * 9 + 3
    assert max(most) == 3  # queries, keys and values


GROUPED = ModelConfig(
    num_attention_heads=4, num_query_groups=2, kv_channels=1, hidden_size=4, position_embedding_type="learned_absolute"
)
QUERY, KEY, VALUE = [0, 1, 2, 3], [10, 11], [20, 21]
FUSED = [0, 1, 10, 20, 2, 3, 11, 21]


def column(rows):
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize("shape", [torch.tensor, column], ids=["bias", "weight"])
def test_fused_qkv_has_each_groups_query_heads_then_its_key_and_value(shape):
    parts = [shape(rows) for rows in (QUERY, KEY, VALUE)]
    fused = QKV.join(parts, GROUPED)
    assert torch.equal(fused, shape(FUSED))
    assert all(torch.equal(part, back) for part, back in zip(parts, QKV.split(fused, GROUPED), strict=True))


@pytest.mark.parametrize(
    ("fusion", "shape"),
    [
        (STACKED_QKV, torch.tensor),
        (STACKED_QKV, column),
        (TRANSPOSED_STACKED_QKV, torch.tensor),
        (TRANSPOSED_STACKED_QKV, lambda rows: column(rows).t()),
    ],
    ids=["bias", "weight", "transposed bias", "transposed weight"],
)
def test_stacked_queries_keys_and_values_are_fused_likewise(fusion, shape):
    stacked = shape(QUERY + KEY + VALUE)
    fused = fusion.join([stacked], GROUPED)
    assert fused.flatten().tolist() == FUSED
    assert fused.size(0) == 8
    assert torch.equal(fusion.split(fused, GROUPED)[0], stacked)


def test_gate_stands_before_up_and_a_transposed_weight_is_turned():
    fused = GATE_UP.join([torch.tensor([[1.0]]), torch.tensor([[2.0]])], GROUPED)
    assert fused.flatten().tolist() == [1.0, 2.0]
    assert [part.item() for part in GATE_UP.split(fused, GROUPED)] == [1.0, 2.0]
    turned = TRANSPOSED.join([torch.tensor([[1, 2], [3, 4]])], GROUPED)
    assert turned.tolist() == [[1, 3], [2, 4]]
    assert TRANSPOSED.split(turned, GROUPED)[0].tolist() == [[1, 2], [3, 4]]
