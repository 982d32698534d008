"""What ranks find out each by itself is the same, or the run does not start."""

import types

import pytest

from megatron_brain.training.run import _check_same_layers


def ranks(*found):
    """What a rank sees of a world in which these were found."""
    return types.SimpleNamespace(gather_over_world=lambda mine: list(found))


def test_nodes_with_and_without_transformer_engine_are_told_apart():
    there, missing = ("transformer_engine", "version 2.16.0"), ("local", "transformer_engine is not installed")
    with pytest.raises(RuntimeError, match=r"rank 1: local \(transformer_engine is not installed\)\. Mend that"):
        _check_same_layers(ranks(there, missing), *there)


def test_the_same_layers_everywhere_are_fine():
    there = ("transformer_engine", "version 2.16.0")
    _check_same_layers(ranks(there, there), *there)
