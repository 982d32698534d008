"""Sizes of the model come from one place, and contradictions are named."""

import pytest
from helpers.assets import SIZES

from megatron_brain.config.model import ModelConfig
from megatron_brain.models.architecture import architecture, resolve


def test_flags_alone_are_filled_with_defaults():
    model = resolve(
        ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, vocab_size=100), None, ""
    )
    assert architecture(model) == {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": False,
    }


def test_a_checkpoints_sizes_are_taken_and_choices_of_the_run_kept():
    found = architecture(resolve(ModelConfig(**SIZES), None, ""))
    model = resolve(ModelConfig(bf16=True, logprob_chunk_size=7), found, "ckpt")
    assert architecture(model) == found
    assert (model.bf16, model.logprob_chunk_size) == (True, 7)


def test_a_size_that_contradicts_the_checkpoint_is_named_with_both_values():
    with pytest.raises(ValueError, match="num_layers=3 was asked for, but ckpt has num_layers=4"):
        resolve(ModelConfig(num_layers=3), {"num_layers": 4}, "ckpt")


def test_missing_sizes_are_all_named():
    with pytest.raises(ValueError, match="ffn_hidden_size, vocab_size are not known: give --hf-model, --load"):
        resolve(ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4), None, "the flags")


def test_a_checkpoint_that_does_not_name_its_positions_has_rotary_ones():
    found = architecture(resolve(ModelConfig(**SIZES), None, ""))
    del found["position_embedding_type"]
    assert resolve(ModelConfig(), found, "ckpt").position_embedding_type == "rope"
    with pytest.raises(
        ValueError, match="position_embedding_type=learned_absolute was asked for, but ckpt has .*=rope"
    ):
        resolve(ModelConfig(position_embedding_type="learned_absolute"), found, "ckpt")


def test_learned_positions_are_what_a_checkpoint_says():
    found = architecture(resolve(ModelConfig(**SIZES, position_embedding_type="learned_absolute"), None, ""))
    assert resolve(ModelConfig(), found, "ckpt").position_embedding_type == "learned_absolute"
