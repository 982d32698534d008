"""The benchmarks against TRL, transformers and vLLM on a tiny model: what they report, and that they notice when the
sides do not do the same work."""

import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.assets import WORDS
from helpers.hf_models import write_hf_model
from helpers.tiny_tokenizers import write_hf_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def work_flags(tmp_path_factory):
    """Flags of a tiny model and a few records."""
    folder = tmp_path_factory.mktemp("peers")
    write_hf_tokenizer(folder / "model", eos_token="</s>", pad_token="<pad>")
    # Ids of the tokenizer: <pad> is 5, </s> is 2.
    write_hf_model(folder / "model", "llama", num_hidden_layers=2, pad_token_id=5, eos_token_id=2)
    data = folder / "records.jsonl"
    texts = itertools.permutations(WORDS[:4], 3)
    records = [{"prompt": f"a {one} {two}:", "completion": f" {three}"} for one, two, three in texts]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = ["--hf-model", str(folder / "model"), "--train-data", str(data), "--dtype", "float32"]
    return [*model, "--pairs", "1", "--threads", "1", "--max-prompt-length", "40", "--max-response-length", "16"]


@pytest.fixture
def run(single, monkeypatch, capsys, work_flags):
    """A function that runs a subject: exit status, JSON (None if there is none) and standard error."""
    monkeypatch.syspath_prepend(TOOLS)
    threads = torch.get_num_threads()

    def measure(subject, *flags):
        status = importlib.import_module("benchmark").main([subject, *work_flags, *flags])
        said = capsys.readouterr()
        return status, json.loads(said.out) if said.out else None, said.err

    yield measure
    torch.set_num_threads(threads)


def subject(name):
    return importlib.import_module(f"benchmarks.{name}")


SFT = ("--seq-length", "64", "--sequences", "2")
REWARD = ("--batch", "4", "--micro-batch-size", "2", "--peer-micro-batch-size", "2")
ROUND = ("--prompts", "2", "--samples", "4", "--max-new-tokens", "6", "--micro-batch-size", "1")
ROUND = (*ROUND, "--peer-micro-batch-size", "4")
SAMPLE = ("--prompts", "4", "--shapes", "2x4")


def test_an_sft_step_trains_on_the_same_tokens_and_the_losses_agree(run):
    status, report, said = run("sft", *SFT)
    assert status == 0, said
    assert report["sequences"] == 2 and 64 < report["tokens"] <= 128 and 0 < report["trained_tokens"] < report["tokens"]
    for losses in report["loss"].values():
        assert losses["ours"] == pytest.approx(losses["baseline"], abs=1e-3)
    assert report["loss"]["last"]["ours"] < report["loss"]["first"]["ours"] - 2e-3, "an update changes what is compared"
    seconds, speeds = report["step"]["wall"], report["tokens_per_second"]
    assert speeds["ours"] == pytest.approx(report["tokens"] / seconds["ours_seconds"])
    assert (report["required_ratio"], report["reached"]) == (3.0, seconds["ratio"] >= 3.0)
    assert report["peer"].startswith("TRL ")


def test_another_loss_of_an_sft_step_is_noticed(run, monkeypatch):
    # TRL learns the prompts too: its labels mark tokens that are not learned with -100, not with 0.
    monkeypatch.setattr(subject("sft"), "_IGNORED", 0)
    status, _, said = run("sft", *SFT)
    assert status == 1 and "FAILED: the first losses are" in said


def test_a_reward_step_has_the_same_pairs_and_losses(run):
    status, report, said = run("reward", *REWARD)
    assert status == 0, said
    assert report["batch"] == 4 and report["tokens_with_shared_prompts"] < report["tokens"]
    for losses in report["loss"].values():
        assert losses["ours"] == pytest.approx(losses["baseline"], abs=2e-4)
    assert report["loss"]["last"]["ours"] < report["loss"]["first"]["ours"] - 5e-4
    assert (report["required_ratio"], report["reached"]) == (2.0, report["step"]["wall"]["ratio"] >= 2.0)


def test_pairs_the_other_way_round_are_noticed(run, monkeypatch):
    trainer = subject("trainers").OurTrainer
    right = trainer.groups

    def swapped(self):
        return [dataclasses.replace(group, responses=group.responses[::-1]) for group in right(self)]

    monkeypatch.setattr(trainer, "groups", swapped)
    status, _, said = run("reward", *REWARD)
    assert status == 1 and "FAILED: the first losses are" in said


def test_a_round_samples_scores_and_updates_on_both_sides(run):
    status, report, said = run("round", *ROUND)
    assert status == 0, said
    assert report["tokens"]["baseline"] == pytest.approx(report["tokens"]["ours"], rel=0.15)
    assert report["difference"]["reward"] < 1e-4 and report["difference"]["log_prior"] < 1e-4
    assert all(norm > 0 for norm in report["gradient_norm"].values())
    assert (report["required_ratio"], report["round"]["pairs"]) == (5.0, 1)


def test_samples_of_all_sides_are_counted_and_are_of_one_distribution(run):
    status, report, said = run("sample", *SAMPLE)
    assert status == 0, said
    assert report["greedy"] == {"ours": 1.0}
    (shape,) = report["shapes"]
    assert (shape["samples"], shape["max_new_tokens"]) == (2, 4)
    assert all(4 * 2 <= tokens <= 4 * 2 * 4 for tokens in shape["tokens"].values())
    assert set(shape["tokens_per_second"]) == {"ours", "transformers"}
    assert shape["against_transformers"]["required_ratio"] == 4.0


def test_a_side_that_draws_at_another_temperature_is_noticed(run, monkeypatch):
    right = subject("samplers").OurSampler.sample
    monkeypatch.setattr(
        subject("samplers").OurSampler,
        "sample",
        lambda self, prompts, *, temperature, **settings: right(self, prompts, temperature=3 * temperature, **settings),
    )
    status, _, said = run("sample", "--prompts", "8", "--shapes", "8x8")
    assert status == 1 and "the mean surprise is" in said


def test_rewards_of_another_model_are_noticed(run, monkeypatch):
    rounds = subject("round")
    right = rounds._differences

    def of_other_rewards(work, reward, records):
        for record in records:
            for response in record["responses"]:
                response["reward"] += 1.0
        return right(work, reward, records)

    monkeypatch.setattr(rounds, "_differences", of_other_rewards)
    status, _, said = run("round", *ROUND)
    assert status == 1 and "FAILED: reward is" in said


STUB = """
import json, sys
print(json.dumps({"engine": "stub " + sys.argv[2] + " " + sys.argv[3]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    assert asked["samples"] < 3, "three samples are too many"
    rows = [[7] * asked["max_new_tokens"]] * asked["samples"]
    print(json.dumps({"tokens": [rows] * len(asked["prompts"])}), flush=True)
"""


@pytest.fixture
def stub_of_vllm(run, monkeypatch, tmp_path):
    """Flags for a stub that always answers with token 7."""
    worker = tmp_path / "worker.py"
    worker.write_text(STUB)
    monkeypatch.setattr(subject("samplers"), "_WORKER", worker)
    return ["--vllm-python", sys.executable, *SAMPLE]


def test_vllm_draws_in_a_process_of_its_own_and_is_checked_too(run, stub_of_vllm):
    status, report, said = run("sample", *stub_of_vllm)
    assert report["engine"] == "stub float32 44"
    (shape,) = report["shapes"]
    assert shape["tokens"]["vllm"] == 4 * 2 * 4
    assert shape["against_vllm"]["required_ratio"] == 1.4
    assert status == 1 and "only 0 of 4 greedy answers of vllm are those of transformers" in said
    assert "the mean surprise is" in said and "for vllm" in said


def test_the_end_of_vllm_is_told_with_its_last_words(run, stub_of_vllm):
    status, _, said = run("sample", *stub_of_vllm[:-1], "3x4")
    assert status == 2 and "vLLM ended: AssertionError: three samples are too many" in said


def test_a_mean_and_its_error_by_hand(run):
    # Tokens 2, 1 and 3 with sums 4, 1 and 7: 12 / 6; residuals 0, -1 and 1.
    assert importlib.import_module("benchmarks.sample").mean_of([4.0, 1.0, 7.0], [2, 1, 3]) == {
        "mean": 2.0,
        "error": pytest.approx(2**0.5 / 6),
    }


@pytest.mark.parametrize(
    ("subject", "flags", "message"),
    [
        ("sft", ["--hf-model", "nowhere"], "nowhere: no Hugging Face directory"),
        ("sft", ["--train-data", "nowhere"], "nowhere: no such file"),
        ("sft", ["--pairs", "0"], "--pairs 0: must be at least 1"),
        ("sft", [*SFT, "--peer-micro-batch-size", "3"], "3 does not divide the 2 samples of a step"),
        ("reward", ["--batch", "24"], "25 records are needed, 24 are within --max-prompt-length"),
        ("sample", ["--shapes", "8x"], "--shapes 8x: expected samples x tokens"),
        ("sample", ["--temperature", "0"], "--temperature 0.0: must be positive"),
        ("sample", ["--vllm-python", "nowhere"], "--vllm-python nowhere: no such file"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(run, subject, flags, message):
    status, report, said = run(subject, *flags)
    assert (status, report) == (2, None)
    assert message in said


def test_a_line_that_is_no_record_is_named(run, tmp_path):
    data = tmp_path / "records.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    status, _, said = run("sft", "--train-data", str(data))
    assert status == 2 and f"{data}:2: expected an object with the texts prompt and completion" in said


def test_a_package_that_is_missing_is_named(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.sft", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    status, _, said = run("sft")
    assert status == 2 and "sft needs trl, which is not installed: pip install trl" in said


@pytest.mark.parametrize("side", ["SFTTrainer", "OurTrainer"])
def test_an_error_of_either_trainer_ends_the_benchmark_with_it(run, monkeypatch, side):
    def broken(self, *args, **kwargs):
        raise RuntimeError("no gradient today")

    method = "training_step" if side == "SFTTrainer" else "step"
    monkeypatch.setattr(getattr(importlib.import_module("benchmarks.sft"), side), method, broken)
    with pytest.raises(RuntimeError, match="no gradient today"):
        run("sft", *SFT)


def test_losses_agree_in_bfloat16_with_either_kind_of_weights_on_the_other_side(run):
    for weights in ("float32", "bfloat16"):
        status, report, said = run("sft", *SFT, "--dtype", "bfloat16", "--peer-weights", weights)
        assert status == 0, said
        first = report["loss"]["first"]
        assert 0 < abs(first["ours"] - first["baseline"]) < 0.1, "rounding is another on each side"
