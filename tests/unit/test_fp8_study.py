"""The study of FP8's errors: its sums by hand, and the whole of it on a tiny model."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.assets import SIZES, write_assets

from megatron_brain.checkpointing import CheckpointSaver, TrainingState
from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.config.run import RunConfig
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(single, monkeypatch):
    """A function that imports a module of tools/; threads are those of before afterwards."""
    monkeypatch.syspath_prepend(TOOLS)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def checkpoint(folder: Path, assets: Path, single, *, seed: int, head: str = "policy") -> Path:
    # Weights large enough for tokens to differ in probability.
    model = resolve(ModelConfig(**SIZES, init_method_std=0.2), None, "the test")
    config = RunConfig(stage="sft", model=model)
    chunks = build_model(model, ParallelConfig(), single, head=head, seed=seed)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(assets / "tokenizer"))
    CheckpointSaver(folder, config, single, tokenizer, head=head).save(1, chunks, TrainingState())
    return folder


def test_every_precision_is_measured_on_a_tiny_model(tool, single, tmp_path, capsys):
    write_assets(tmp_path)
    policy, prior = (checkpoint(tmp_path / f"policy{seed}", tmp_path, single, seed=seed) for seed in (1, 2))
    reward = checkpoint(tmp_path / "reward", tmp_path, single, seed=1, head="reward")
    flags = {
        **{"load": policy, "prior-load": prior, "reward-load": reward, "prompts": tmp_path / "prompts.jsonl"},
        **{"lengths": "4,16", "gradient-lengths": 16, "samples": 4, "groups": 3, "tokens": 128, "threads": 1},
        **{"max-prompt-length": 40, "moved": "0,0.1"},
    }
    status = tool("benchmark").main(["fp8", *(f"--{name}={value}" for name, value in flags.items())])
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert status == 0 and report["groups"] == 3
    # 128 tokens are two groups of four times 16.
    assert [each["groups"] for each in report["lengths"].values()] == [3, 2]
    for each in report["lengths"].values():
        assert each["fp32"]["logprob_std"] == 0 == each["fp32"]["moved 0.1"]["beta_tv"]
        # The same weights in one precision are one policy; in two they are not.
        assert each["hybrid"]["moved 0"] == {**each["fp32"]["moved 0"], "ess_beta": pytest.approx(4)}
        assert each["bf16"]["mixed"]["ratio_std"] == 0 < each["hybrid"]["mixed"]["ratio_std"]
        errors = [each[name]["logprob_std"] for name in ("bf16", "hybrid_ends_bf16", "hybrid")]
        assert 0 < 3 * errors[0] < min(errors[1:])
        assert 0 < each["bf16"]["reward_std"] < each["hybrid"]["reward_std"]
    gradient = report["lengths"]["16"]["gradient"]
    assert list(gradient) == ["bf16", "hybrid", "hybrid_ends_bf16", "e4m3", "e4m3_ends_bf16"]
    assert 0.999 < gradient["bf16"]["backward"]["cosine"] < 1
    assert gradient["hybrid"]["backward"]["cosine"] < gradient["e4m3"]["backward"]["cosine"] < 0.999
    assert gradient["hybrid"]["whole"] != gradient["hybrid"]["backward"]
    assert "| 16 | hybrid |" in said.err


def test_a_policy_is_no_reward_model(tool, single, tmp_path, capsys):
    write_assets(tmp_path)
    policy = checkpoint(tmp_path / "policy", tmp_path, single, seed=1)
    flags = {"load": policy, "prior-load": policy, "reward-load": policy, "prompts": tmp_path / "prompts.jsonl"}
    flags |= {"lengths": 4, "groups": 1, "max-prompt-length": 40, "threads": 1}
    assert tool("benchmark").main(["fp8", *(f"--{name}={value}" for name, value in flags.items())]) == 2
    assert "--reward-load" in capsys.readouterr().err


def test_all_weights_are_rounded_to_bfloat16(tool, single, tmp_path):
    write_assets(tmp_path)
    reward = checkpoint(tmp_path / "reward", tmp_path, single, seed=1, head="reward")
    settings = {"load": str(reward), "prompts": "x", "output": "x"}
    settings |= {"tokenizer_model": str(tmp_path / "tokenizer"), "seq_length": 32, "max_new_tokens": 4}
    precisions, fp8 = tool("benchmarks.precisions"), tool("benchmarks.fp8")
    run = fp8.open_run(fp8.config_from_dict("generate", settings, "the test"))
    model = precisions.Model(run, "fp32", "reward", reward, "reward")
    for weight in model.chunk.parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, weight.bfloat16().float())


def test_gradients_are_compared_by_hand(tool):
    found = tool("benchmarks.fp8")._compared([torch.tensor([0.0, 2.0])], [torch.tensor([1.0, 1.0])])
    assert found == {"cosine": pytest.approx(math.sqrt(0.5)), "norm_ratio": pytest.approx(math.sqrt(2))}


def test_errors_of_scores_by_hand(tool):
    exact = {"prior": torch.tensor([[-3.0, -4.0]] * 2), "reward": torch.zeros(2, 2)}
    exact |= {"proposal": exact["prior"], "moved 1": torch.tensor([[-3.0, -4.0 + math.log(3)]] * 2)}
    # Errors of 1 and 3 nats, 1 below and above their mean, and of 11 and 13. They are the same before and after.
    other = {name: values + torch.tensor([[1.0, 3.0], [11.0, 13.0]]) for name, values in exact.items()}
    other["reward"] = exact["reward"]
    other["prior"] = exact["prior"]
    report = tool("benchmarks.fp8").compare({"fp32": exact, "bf16": exact, "hybrid": other}, [1], 1.0)
    hybrid = report["hybrid"]
    assert hybrid["logprob_mean"] == 7.0
    assert hybrid["logprob_std"] == pytest.approx(math.sqrt((36 + 16 + 16 + 36) / 3))
    assert hybrid["group_std"] == pytest.approx(math.sqrt(2))
    assert hybrid["mixed"]["ratio_std"] == pytest.approx(math.sqrt(2))
    assert hybrid["mixed"]["max_ratio"] == pytest.approx(math.exp(13))
    # beta is 1/4, 3/4 in both: what the two have in common has cancelled.
    assert (hybrid["moved 1"]["ratio_std"], hybrid["moved 1"]["beta_tv"]) == pytest.approx((0, 0), abs=1e-6)
    assert hybrid["moved 1"]["ess_beta"] == pytest.approx(1 / (1 / 16 + 9 / 16))
    # alpha is softmax(-1, -3) instead of 1/2, 1/2.
    assert hybrid["alpha_tv"] == pytest.approx(1 / (1 + math.exp(-2)) - 0.5)


def test_growth_is_the_exponent_of_length(tool):
    lengths = {
        length: {name: {"logprob_std": 0.1 * length**0.5, "group_std": 0.2 * length} for name in ("bf16", "hybrid")}
        for length in (16, 64, 256)
    }
    found = tool("benchmarks.fp8").growth(
        {length: {**each, "hybrid_ends_bf16": each["hybrid"]} for length, each in lengths.items()}
    )
    assert found["hybrid"] == {"logprob_std": pytest.approx(0.5), "group_std": pytest.approx(1.0)}
