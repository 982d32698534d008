"""Training in FP8 with Transformer Engine's own layers, autograd functions and recipes, on a CPU.

Its Python runs in separate processes over a fake of the compiled extension, as for test_checkpoints.py, which says
what TE_ON_CPU must be. FP8 is that of Transformer Engine's reference quantizer: right numbers, without its kernels.
"""

import json

import pytest
from helpers.architectures import ARCHITECTURES
from helpers.te_process import needs_te, run_with_te

pytestmark = needs_te

REFERENCE = {
    "fp8_recipe": "custom",
    "fp8_quantizer_factory": "transformer_engine.pytorch.custom_recipes.reference_current_scaling."
    "current_scaling_ref_factory",
}
FIRST_LAST = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 2}
CASES = {
    "policy": {"fp8": REFERENCE},
    "reward": {"fp8": REFERENCE, "head": "reward"},
    "bf16": {"fp8": None},
    "tensorwise": {"fp8": {}},
    "recompute": {"fp8": REFERENCE, "recompute_granularity": "full"},
    "first_last": {"fp8": REFERENCE | FIRST_LAST, "num_layers": 4},
    **{name: {"fp8": REFERENCE, **settings} for name, settings in ARCHITECTURES.items()},
}
IN_FP8 = [name for name, options in CASES.items() if options["fp8"] is not None]
LINEAR = ["mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv"]
LAYOUTS = {"one_process": 1, "tp2_sp": 2}


@pytest.fixture(scope="module", params=LAYOUTS)
def found(tmp_path_factory, request):
    """The results that train_fp8.py has written."""
    processes, file = LAYOUTS[request.param], tmp_path_factory.mktemp("fp8") / "found.json"
    run_with_te("train_fp8.py", file, json.dumps(CASES), processes=processes)
    return json.loads(file.read_text())


def linear_maps(*layers):
    return [f"decoder.layers.{layer}.{name}" for layer in layers for name in LINEAR]


@pytest.mark.parametrize("case", IN_FP8)
def test_the_loss_falls(found, case):
    losses = found["cases"][case]["losses"]
    assert len(losses) == 8 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1


def test_fp8_is_near_bfloat16_and_not_the_same(found):
    """The FP8 formats have 3 and 2 bits of mantissa, bfloat16 has 7."""
    plain = found["cases"]["bf16"]["losses"]
    for case in ("policy", "tensorwise"):
        losses = found["cases"][case]["losses"]
        assert losses != plain and losses == pytest.approx(plain, rel=0.005)


@pytest.mark.parametrize("case", [name for name in IN_FP8 if name not in ("tensorwise", "first_last")])
def test_every_linear_map_of_every_layer_is_in_fp8_and_nothing_else(found, case):
    """The output layer and reward head are not: 2 layers have 4 maps each, and a map has one product of each kind."""
    found = found["cases"][case]
    assert found["fp8"] == linear_maps(0, 1) and found["plain"] == []
    assert found["products"] == {
        "fprop e4m3fn e4m3fn": 16 if case == "recompute" else 8,
        "dgrad e5m2 e4m3fn": 8,
        "wgrad e5m2 e4m3fn": 8,
    }


def test_layers_left_in_bfloat16_are_those_that_were_named(found):
    found = found["cases"]["first_last"]
    assert found["fp8"] == linear_maps(1) and found["plain"] == linear_maps(0, 2, 3)
    assert found["products"] == {"fprop e4m3fn e4m3fn": 4, "dgrad e5m2 e4m3fn": 4, "wgrad e5m2 e4m3fn": 4}


def test_recomputed_activations_change_nothing(found):
    assert found["cases"]["recompute"]["losses"] == found["cases"]["policy"]["losses"]


@pytest.mark.parametrize("case", CASES)
def test_attention_of_a_shared_prefix_takes_two_calls_that_transformer_engine_understands(found, case):
    """train_fp8.py has bound their arguments to the signature of `DotProductAttention.forward`. The rest is padding."""
    first, second = found["cases"][case]["attention"][:2]
    assert first["attn_mask_type"] == "padding_causal" and first["cu_seqlens_q"] == first["cu_seqlens_kv"]
    assert first["cu_seqlens_q"][0] == 3 and sum(first["cu_seqlens_q"]) % 16 == 16 - 2 - 3
    assert second == {
        "attn_mask_type": "padding_causal_bottom_right",
        "qkv_format": "thd",
        "cu_seqlens_q": [2, 3],
        "cu_seqlens_kv": [5, 6],
    }


def test_recipes_have_our_settings(found):
    assert found["recipes"] == {
        "delayed": {
            "class": "DelayedScaling",
            "format": "HYBRID",
            "margin": 2,
            "amax_history_len": 32,
            "amax_compute_algo": "most_recent",
        },
        "delayed_e4m3": {
            "class": "DelayedScaling",
            "format": "E4M3",
            "margin": 0,
            "amax_history_len": 1024,
            "amax_compute_algo": "max",
        },
        "tensorwise": {"class": "Float8CurrentScaling", "format": "HYBRID"},
        "blockwise": {"class": "Float8BlockScaling", "format": "E4M3"},
        "mxfp8": {"class": "MXFP8BlockScaling", "format": "HYBRID"},
    }
