"""Checkpoints of the `local` and the `transformer_engine` layers are the same, and each loads the other's.

Transformer Engine's own Python runs in separate processes, on the CPU, over a fake of its compiled extension (see
fake_te.py); this process runs without it. The tests are skipped unless TE_ON_CPU names a folder made by

    pip install --no-deps --target FOLDER transformer-engine==2.20.2 triton onnx onnxscript onnx-ir ml_dtypes protobuf
    pip install --no-deps --target FOLDER pydantic pydantic-core annotated-types typing-inspection einops
"""

import json

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.te_process import needs_te, run_with_te
from helpers.tiny_training import BATCHES, Training

from megatron_brain.checkpointing import read_info
from megatron_brain.checkpointing.storage import read_tensors

pytestmark = needs_te

CASES = {
    "policy": {},
    "policy_bf16": {"bf16": True, "untie_embeddings_and_output_weights": True},
    "policy_distributed_optimizer": {"distributed_optimizer": True},
    "reward": {"head": "reward"},
    # Where keys are not rotated, the gradient of their bias is only rounding: with the usual 1e-8, Adam would turn it
    # into full steps.
    **{name: {"adam_eps": 1e-5, **settings} for name, settings in ARCHITECTURES.items()},
}
LAYOUTS = {"one_process": 1, "tp2_sp": 2}
"""Number of processes that run Transformer Engine's layers. The local layers run in this process."""


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(single, tmp_path_factory, request):
    """Folder with the checkpoints of iterations 2 and 3 of every case.

    te, local: trained from the same seed with Transformer Engine's layers or the local ones. from_local: iteration 2 of
    `local`, loaded, saved and trained further with Transformer Engine's layers. from_te: the other way round.
    """
    root = tmp_path_factory.mktemp("te")
    straight = {name: Training(single, transformer_impl="local", **options) for name, options in CASES.items()}
    for name, training in straight.items():
        for _ in range(2):
            training.step()
        save(training, root / name / "local")
    run_with_te("train.py", root, json.dumps(CASES), processes=LAYOUTS[request.param])
    for name, options in CASES.items():
        resumed = Training(single, transformer_impl="local", seed=99, **options)
        resumed.resume(read_info(root / name / "te" / "iter_0000002"))
        save(resumed, root / name / "from_te")
        for training, folder in ((straight[name], "local"), (resumed, "from_te")):
            training.step()
            training.save(root / name / folder, 3)
    return root


def save(training, folder):
    training.save(folder, 2)
    (folder / "outputs.json").write_text(json.dumps(training.chunks[0](BATCHES[0]).tolist()))


@pytest.fixture(params=CASES)
def case(trained, request):
    """Folder of one case."""
    return trained / request.param


def stored(folder, iteration):
    """Weights and optimizer state by global name."""
    tensors = read_tensors(folder / f"iter_{iteration:07d}")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}


def test_both_store_the_same_names_shapes_and_types(case):
    te, local = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in stored(case / folder, 2).items()}
        for folder in ("te", "local")
    )
    assert te == local
    # Transformer Engine has the norm inside of the linear layer; the local layers have it separately.
    norm = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert te.keys() >= {norm, f"optimizer.exp_avg.{norm}", f"optimizer.exp_avg_sq.{norm}"}


@pytest.mark.parametrize("origin", ["te", "local"])
def test_each_holds_bit_for_bit_what_it_loads_from_the_other(case, origin):
    saved, loaded = stored(case / origin, 2), stored(case / f"from_{origin}", 2)
    assert saved.keys() == loaded.keys()
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []


def outputs(folder):
    return torch.tensor(json.loads((folder / "outputs.json").read_text()))


@pytest.mark.parametrize("origin", ["te", "local"])
def test_both_make_the_same_of_the_same_weights(case, origin):
    """Every weight is not only read unchanged, but also put in the right place."""
    tolerance = 2e-2 if read_info(case / origin).bf16 else 1e-5
    torch.testing.assert_close(outputs(case / f"from_{origin}"), outputs(case / origin), rtol=tolerance, atol=tolerance)


def test_both_train_alike_from_the_same_seed(case):
    tolerance = 2e-2 if read_info(case / "te").bf16 else 1e-4
    torch.testing.assert_close(outputs(case / "te"), outputs(case / "local"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("origin", ["te", "local"])
def test_each_trains_on_as_the_other_would_have(case, origin):
    """If a moment or the count of steps were lost, the next update would be quite different."""
    before, expected, actual = stored(case / origin, 2), stored(case / origin, 3), stored(case / f"from_{origin}", 3)
    # In such an update a bfloat16 weight near 1 moves by one rounding step or not at all.
    tolerance = 0.25 if read_info(case / origin).bf16 else 1e-4
    for name in expected:
        update = (expected[name] - before[name]).float().norm()
        assert (actual[name] - expected[name]).float().norm() <= tolerance * update, name
