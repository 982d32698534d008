"""What ranks find out each by itself is the same, or the run does not start."""

import types

import pytest
from helpers.assets import size_flags, write_assets

from megatron_brain.config.loader import load_config
from megatron_brain.errors import AgreedError, ConfigError
from megatron_brain.training.start import _check_same_layers, open_run


def ranks(*found):
    """What a rank sees of a world in which these were found."""
    return types.SimpleNamespace(gather_over_world=lambda mine: list(found))


def test_nodes_with_and_without_transformer_engine_are_told_apart():
    there, missing = ("transformer_engine", "version 2.16.0"), ("local", "transformer_engine is not installed")
    with pytest.raises(AgreedError, match=r"rank 1: local \(transformer_engine is not installed\)\. Mend that"):
        _check_same_layers(ranks(there, missing), *there)


def test_the_same_layers_everywhere_are_fine():
    there = ("transformer_engine", "version 2.16.0")
    _check_same_layers(ranks(there, there), *there)


def test_fp8_that_cannot_run_here_is_refused_before_ranks_connect(monkeypatch, tmp_path):
    write_assets(tmp_path)
    monkeypatch.setattr("megatron_brain.runtime.parallel.start", lambda *args, **options: pytest.fail("connected"))
    flags = [*size_flags(), "--tokenizer-model", str(tmp_path / "tokenizer"), "--seq-length", "64", "--bf16"]
    flags += ["--train-data", str(tmp_path / "sft.jsonl"), "--fp8-format", "hybrid"]
    with pytest.raises(ConfigError, match=r"fp8_format=hybrid needs the layers of transformer_engine"):
        open_run(load_config("sft", flags))
