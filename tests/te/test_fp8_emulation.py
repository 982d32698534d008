"""The emulated FP8 layers compute what Transformer Engine's own reference of the recipe computes.

The tests are skipped unless TE_ON_CPU names a folder with Transformer Engine's Python, see test_checkpoints.py.
"""

import json
import subprocess

import pytest
import torch
from helpers.te_process import needs_te, run_with_te

pytestmark = needs_te


@pytest.fixture(scope="module")
def measured():
    result = run_with_te("emulate_fp8.py", stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def test_codes_scales_and_all_three_products_equal_the_reference_bit_for_bit(measured):
    differing = dict(measured["products"])
    assert differing.pop("cases") == 480
    assert set(differing.values()) == {0}, differing


def test_a_model_computes_what_transformer_engines_layers_do_with_the_reference(measured):
    """Norms and attention add up in another order, so a value in the middle between two FP8 numbers may round to the
    other one. This changes far less than FP8 itself."""
    reference, emulation, plain = (measured["model"][name] for name in ("reference", "emulation", "plain"))
    assert reference["gradients"].keys() == emulation["gradients"].keys()
    for name, values in [("logprobs", reference["logprobs"]), *reference["gradients"].items()]:
        theirs = torch.tensor(values)
        ours, without = (
            torch.tensor(each["logprobs"] if name == "logprobs" else each["gradients"][name])
            for each in (emulation, plain)
        )
        # Most of the embedding's gradient comes from the output layer, which is never in FP8.
        least = 1e-4 if name == "logprobs" else 1e-2
        assert (without - theirs).norm() > least * theirs.norm(), name
        assert (ours - theirs).norm() < 1e-2 * (without - theirs).norm(), name
