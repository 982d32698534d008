"""The whole chain with a tiny random model: Hugging Face -> SFT -> reward -> BRAIn -> evaluate -> Hugging Face."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.assets import SIZES, write_assets
from helpers.console import strange_lines
from helpers.stub_json import StubJson, chat_judge
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from megatron_brain.config.loader import load_config
from megatron_brain.stages.brain.stage import BrainStage
from megatron_brain.stages.reward.stage import RewardStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.trainer import metric_names, metrics_on_console

ROOT = Path(__file__).parents[2]
LENGTHS = ["--seq-length", "64", "--no-progress"]


def run(*command: str) -> str:
    """Run a command in the checkout. Returns what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def stage(name: str, *flags: str, processes: int = 2) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    output = run(sys.executable, *launcher, "-m", "megatron_brain", name, *LENGTHS, *flags)
    assert not strange_lines(output) and output.count(f"{name} with megatron_brain ") == 1, output
    return output


def tool(name: str, *flags: str) -> str:
    return run(sys.executable, f"tools/{name}.py", *flags)


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A folder in which the whole chain has run. A step that fails raises."""
    work = tmp_path_factory.mktemp("chain")
    write_assets(work)
    _write_base_model(work)
    tool("convert_hf_to_megatron", "--hf-model", str(work / "base_hf"), "--save", str(work / "base"))
    batch = ["--global-batch-size", "8", "--micro-batch-size", "2", "--lr", "3e-3"]
    stage(
        *("sft", "--load", str(work / "base"), "--finetune", "--save", str(work / "sft")),
        *("--train-data", str(work / "sft.jsonl"), "--valid-data", str(work / "sft.jsonl")),
        *("--train-iters", "6", "--pipeline-model-parallel-size", "2", *batch),
    )
    stage(
        *("reward", "--load", str(work / "sft"), "--finetune", "--save", str(work / "reward")),
        *("--train-data", str(work / "pairs.jsonl"), "--valid-data", str(work / "pairs.jsonl")),
        *("--train-epochs", "1", *batch),
    )
    stage(
        *("brain", "--load", str(work / "sft"), "--finetune", "--reward-load", str(work / "reward")),
        *("--save", str(work / "brain"), "--save-interval", "3", "--rollout-dir", str(work / "rollouts")),
        *("--train-data", str(work / "prompts.jsonl"), "--prompts-per-round", "16", "--samples-per-prompt", "4"),
        *("--max-new-tokens", "8", "--train-iters", "4", *batch),
    )
    for model in ("sft", "brain", "reward"):
        tool("convert_megatron_to_hf", "--load", str(work / model), "--save", str(work / f"{model}_hf"))
    return work


def _write_base_model(work: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    config = LlamaConfig(
        num_hidden_layers=SIZES["num_layers"],
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["ffn_hidden_size"],
        num_attention_heads=SIZES["num_attention_heads"],
        num_key_value_heads=SIZES["num_query_groups"],
        vocab_size=SIZES["vocab_size"],
        max_position_embeddings=SIZES["max_position_embeddings"],
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(work / "base_hf")
    tokenizer.save_pretrained(work / "base_hf")


def test_layouts_that_make_libraries_warn_print_our_lines_alone(chain, tmp_path):
    output = stage(
        *("sft", "--load", str(chain / "base"), "--finetune", "--save", str(tmp_path / "sft")),
        *("--train-data", str(chain / "sft.jsonl"), "--train-iters", "2", "--global-batch-size", "4", "--bf16"),
        *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity", "selective"),
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    )
    assert output.count("iteration ") == 2 and "tensor 2 x data 1 x pipeline 1; sequence parallel" in output


def test_sft_lowers_the_validation_loss(chain):
    losses = [line["validation/loss"] for line in metrics(chain / "sft") if "validation/loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.05


def test_reward_model_learns_the_pairs(chain):
    accuracies = [line["validation/accuracy"] for line in metrics(chain / "reward") if "validation/accuracy" in line]
    assert accuracies[-1] > max(0.65, accuracies[0])


def test_brain_logs_the_health_of_every_step(chain):
    steps = [line for line in metrics(chain / "brain") if "loss" in line]
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert 1 <= line["ess_alpha"] <= 4 and 1 <= line["ess_beta"] <= 4.0001
        assert line["loss"] > -1e-6 and line["max_ratio"] > 0
    assert steps[0]["ess_beta"] == pytest.approx(4, abs=1e-3)
    assert steps[0]["beta_error_at_refresh"] < 1e-4


def test_every_metric_in_the_files_is_one_that_log_metrics_knows(chain):
    for name, stage_type in {"sft": SFTStage, "reward": RewardStage, "brain": BrainStage}.items():
        logged = {key.removeprefix("validation/") for line in metrics(chain / name) for key in line} - {"iteration"}
        config = load_config(name, ["--config", str(chain / name / "config.yaml")])
        assert logged == set(metric_names(config, stage_type)), name
        assert set(metrics_on_console(config, stage_type)) <= logged


def test_the_entropy_of_a_round_is_estimated_from_its_rollouts(chain):
    rounds = [line["proposal_entropy"] for line in metrics(chain / "brain") if "proposal_entropy" in line]
    assert len(rounds) == 2
    for number, entropy in enumerate(rounds):
        file = chain / "rollouts" / f"round_{number:04d}.jsonl"
        responses = [r for line in file.read_text().splitlines() for r in json.loads(line)["responses"]]
        tokens = sum(len(response["tokens"]) for response in responses)
        assert entropy == pytest.approx(-sum(r["log_proposal"] for r in responses) / tokens, rel=1e-6)
    assert rounds[0] == pytest.approx(metrics(chain / "sft")[-1]["validation/entropy"], rel=0.05)  # the same model


def test_brain_resumed_inside_a_round_ends_where_the_uninterrupted_run_did(chain, tmp_path):
    stage(
        *("brain", "--load", str(chain / "brain" / "iter_0000003"), "--prior-load", str(chain / "sft")),
        *("--reward-load", str(chain / "reward"), "--save", str(tmp_path / "resumed")),
        *("--train-data", str(chain / "prompts.jsonl"), "--prompts-per-round", "16", "--samples-per-prompt", "4"),
        *("--max-new-tokens", "8", "--train-iters", "4", "--global-batch-size", "8", "--micro-batch-size", "2"),
        *("--lr", "3e-3"),
    )
    expected, actual = metrics(chain / "brain")[-1], metrics(tmp_path / "resumed")[-1]
    for name in ("iteration", "loss", "grad_norm", "lr"):
        assert actual[name] == expected[name], name


def test_rollouts_read_back_train_like_the_run_that_wrote_them(chain, tmp_path):
    stage(
        *("brain", "--load", str(chain / "sft"), "--finetune", "--save", str(tmp_path / "again")),
        *("--rollout-data", str(chain / "rollouts" / "round_0000.jsonl"), "--samples-per-prompt", "4"),
        *("--train-iters", "2", "--global-batch-size", "8", "--micro-batch-size", "2", "--lr", "3e-3"),
        *("--lr-decay-iters", "4"),
        processes=1,
    )
    again = metrics(tmp_path / "again")
    assert len(again) == 2
    for written, read in zip(metrics(chain / "brain"), again, strict=False):
        assert read["loss"] == pytest.approx(written["loss"], rel=1e-5)
        assert read["grad_norm"] == pytest.approx(written["grad_norm"], rel=1e-5)


def test_generate_and_evaluate_write_their_reports(chain):
    shared = ["--max-new-tokens", "8", "--prompts", str(chain / "sft.jsonl"), "--max-prompts", "10"]
    stage(
        *("generate", "--load", str(chain / "brain"), "--temperature", "0", "--samples-per-prompt", "2", *shared),
        *("--output", str(chain / "generated.jsonl")),
    )
    rows = [json.loads(line) for line in (chain / "generated.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert all(row["responses"][0] == row["responses"][1] for row in rows), "greedy answers differ"
    with StubJson(chat_judge(lambda message: "A")) as judge:
        stage(
            *("evaluate", "--load", str(chain / "brain"), "--prior-load", str(chain / "sft"), *shared),
            *("--reward-load", str(chain / "reward"), "--judge", f"{Path(__file__).with_name('toy_judge.py')}:score"),
            *("--judge-url", judge.url, "--judge-model", "first", "--output", str(chain / "evaluation.json")),
        )
    report = json.loads((chain / "evaluation.json").read_text())
    assert report["num_prompts"] == 10 and len(report["examples"]) == 3
    for name in ("kl_to_prior", "win_rate/reward/policy_vs_baseline", "win_rate/judge/policy_vs_reference"):
        estimate = report["metrics"][name]
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert report["metrics"]["judge/reference"]["value"] == 1
    assert report["metrics"]["win_rate/llm/policy_vs_reference"]["value"] == 0.5
    assert report["llm_judge"]["comparisons"]["policy_vs_reference"]["compared"] == 10
    verdicts = (chain / "evaluation.json.verdicts.jsonl").read_text().splitlines()
    assert len(verdicts) == len(judge.requests) >= 21


def test_exported_models_load_in_transformers_and_answer(chain):
    tokenizer = AutoTokenizer.from_pretrained(chain / "brain_hf")
    policy = AutoModelForCausalLM.from_pretrained(chain / "brain_hf")
    row = json.loads((chain / "rollouts" / "round_0000.jsonl").read_text().splitlines()[0])
    ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
    assert ids[0].tolist() == row["prompt_tokens"]
    assert policy.generate(ids, max_new_tokens=4, do_sample=False).size(1) > ids.size(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(chain / "reward_hf")
    # transformers takes tokens of padding at the end for padding, also where an unfinished response has drawn them.
    responses = [each for each in row["responses"] if each["tokens"][-1] != classifier.config.pad_token_id]
    assert len(responses) >= 2
    for response in responses:
        tokens = torch.tensor([row["prompt_tokens"] + response["tokens"]])
        assert classifier(tokens).logits.item() == pytest.approx(response["reward"], abs=1e-4)


def test_sequence_log_probs_are_those_of_the_exported_model(chain):
    policy = AutoModelForCausalLM.from_pretrained(chain / "sft_hf")
    for line in (chain / "rollouts" / "round_0000.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = row["prompt_tokens"]
        for response in row["responses"]:
            ids = torch.tensor([prompt + response["tokens"]])
            with torch.no_grad():
                logprobs = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, ids[0, len(prompt) :, None]).sum().item()
            assert response["log_prior"] == pytest.approx(expected, abs=1e-4)
            assert response["sampler_logprob"] == pytest.approx(expected, abs=1e-4)
