"""--dry-run: its numbers against independent ones, what a start refuses, and nothing of what a start makes."""

import json
import shutil

import pytest
from helpers.assets import SIZES, size_flags, write_assets
from helpers.reports import read_report
from megatron.core.parallel_state import RankGenerator

from megatron_brain.__main__ import main
from megatron_brain.checkpointing import CheckpointInfo
from megatron_brain.config.loader import load_config
from megatron_brain.planning.memory import Memory
from megatron_brain.stages.reward.stage import RewardStage
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.start import open_run


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Tokenizer and records, and checkpoints that say what they are but hold no weights."""
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder)
    write_checkpoint(folder / "policy", stage="sft", head="policy")
    write_checkpoint(folder / "reward", stage="reward", head="reward")
    return folder


def write_checkpoint(root, *, stage, head, **sizes):
    folder = root / "iter_0000007"
    folder.mkdir(parents=True)
    info = CheckpointInfo(
        path=folder,
        iteration=7,
        stage=stage,
        head=head,
        architecture=SIZES | sizes,
        tokenizer_type="HuggingFaceTokenizer",
        stage_state={},
        trainer_state={},
        has_optimizer=True,
        bf16=False,
        layout={"pipeline": 1, "tensor": 1, "data": 1},
    )
    info.write(folder)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    shutil.copytree(root.parent / "tokenizer", folder / "tokenizer")


@pytest.fixture
def nothing_starts(monkeypatch):
    """Fail where a process group or a device is asked for."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run starts nothing")

    for name in ("distributed.init_process_group", "distributed.new_group", "cuda.is_available", "cuda.set_device"):
        monkeypatch.setattr(f"torch.{name}", refuse)
    monkeypatch.setattr("megatron_brain.runtime.parallel.start", refuse)


@pytest.fixture
def dry_run(monkeypatch, capsys, nothing_starts):
    """Run it for a world size; gives the report as {section: {name: value}}, what was checked and left out as lists."""

    def run(world_size, *argv):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        assert main([*argv, "--dry-run"]) == 0
        return read_report(capsys.readouterr().out)

    return run


def sized(stage, *flags):
    """A run whose sizes are flags and whose files are all elsewhere."""
    argv = [stage, *size_flags(), "--seq-length", "128", "--tokenizer-model", "/no/tokenizer"]
    return [*argv, "--train-data", "/no/data.jsonl", *flags]


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 4), (4, 1, 2), (2, 4, 2), (4, 2, 4), (2, 2, 1)])
def test_the_first_groups_are_those_that_megatron_core_makes(dry_run, tensor, pipeline, data):
    layout = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
    shown = dry_run(tensor * pipeline * data, *sized("sft", *layout, "--global-batch-size", "16"))["Layout"]

    generator = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    for name, token in (("tensor", "tp"), ("data", "dp"), ("pipeline", "pp")):
        assert shown[f"first {name} group"] == ", ".join(map(str, generator.get_ranks(token)[0]))


def test_a_tensor_group_that_leaves_its_node_is_a_warning(dry_run, monkeypatch):
    argv = sized("sft", "--tensor-model-parallel-size", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "warning" not in dry_run(16, *argv, "--global-batch-size", "16")["Layout"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert "nodes of 6 GPUs" in dry_run(12, *argv, "--global-batch-size", "12")["Layout"]["warning"]


def test_a_recipe_that_an_h100_lacks_is_a_warning(dry_run):
    argv = sized("sft", "--bf16", "--hidden-size", "256", "--ffn-hidden-size", "512", "--fp8-format", "hybrid")
    assert "warning" not in dry_run(1, *argv, "--fp8-recipe", "blockwise")["FP8"]
    warning = dry_run(1, *argv, "--fp8-recipe", "mxfp8")["FP8"]["warning"]
    assert "not on an H100: fp8_recipe=mxfp8 needs compute capability 10.0" in warning


def test_batch_arithmetic_and_bubble_are_those_of_the_schedule(dry_run):
    layout = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
    batch = ["--global-batch-size", "48", "--micro-batch-size", "2", "--seq-length", "64"]
    shown = dry_run(8, *sized("sft", *layout, *batch))["Batch"]
    # 8 processes / 2 pipeline stages = 4 replicas; 48 / (2 x 4) = 6 micro-batches; 1 slot waits beside 6 x 2 chunks.
    assert shown["global batch"] == "48 sequences = micro-batch 2 x data 4 x 6 micro-batches"
    assert shown["per replica and step"] == "12 sequences"
    assert shown["tokens of a step"].startswith("at most 3,072:")
    assert shown["pipeline bubble"].startswith(f"{1 / 13:.1%} of a step")


def test_rounds_of_brain_are_counted_from_the_prompts(dry_run, assets):
    argv = ["brain", "--load", f"{assets}/policy", "--finetune", "--reward-load", f"{assets}/reward"]
    argv += ["--train-data", f"{assets}/prompts.jsonl", "--seq-length", "128", "--max-new-tokens", "16"]
    argv += ["--samples-per-prompt", "4", "--prompts-per-round", "16", "--global-batch-size", "8"]
    shown = dry_run(4, *argv, "--save", f"{assets}/brain", "--save-interval", "4")
    # 40 prompts in rounds of 16 are 3 rounds; a round is 2 steps, so there are 6, and saves after 4 and 6.
    assert shown["Batch"]["round"] == "16 groups, 64 responses, 2 steps"
    assert shown["Batch"]["sampled on a replica"].startswith("16 responses a round")
    assert shown["Schedule"]["iterations"] == "6: 3 rounds of 2 steps"
    assert shown["Schedule"]["saves"].endswith(": 2")
    checked = shown["Checked"]
    for seen in ("policy/iter_0000007: weights to start from", "reward/iter_0000007: a reward model", "40 records"):
        assert seen in checked
    assert shown["Not looked at, not on this machine"].count("- ") == 1  # the GPUs


def test_what_validations_of_brain_answer_and_keep_is_said(dry_run, assets):
    argv = ["brain", "--load", f"{assets}/policy", "--finetune", "--reward-load", f"{assets}/reward"]
    argv += ["--train-data", f"{assets}/prompts.jsonl", "--seq-length", "128", "--max-new-tokens", "16"]
    argv += ["--samples-per-prompt", "4", "--prompts-per-round", "16", "--global-batch-size", "8"]
    assert dry_run(4, *argv)["Schedule"]["validations"] == "none"
    argv += ["--valid-data", f"{assets}/sft.jsonl", "--max-valid-records", "9", "--eval-interval", "2"]
    argv += ["--save", f"{assets}/brain", "--keep-best", "win_rate_reward", "--stop-at-kl", "5"]
    shown = dry_run(4, *argv)["Schedule"]
    assert shown["validations"].endswith("and before the first: 4")
    answers = "9 held-out prompts: 2 answers each, and at the first one 2 of the prior, of at most 16 tokens"
    assert shown["of a validation"] == answers
    assert "improve win_rate_reward" in shown["also saved"] and "exceeds 5 nats" in shown["ends early"]
    assert "3 answers each" in dry_run(4, *argv, "--temperature", "0.7")["Schedule"]["of a validation"]
    argv[argv.index("win_rate_reward")] = "win_rate"
    with pytest.raises(AssertionError):
        dry_run(4, *argv)


@pytest.mark.parametrize(("stage", "made", "data"), [("sft", SFTStage, "sft"), ("reward", RewardStage, "pairs")])
def test_iterations_are_those_of_the_stage_that_reads_the_same_records(
    stage, made, data, assets, monkeypatch, capsys, request
):
    argv = ["--tokenizer-model", f"{assets}/tokenizer", "--train-data", f"{assets}/{data}.jsonl", *size_flags()]
    argv += ["--seq-length", "128", "--train-epochs", "2.5", "--global-batch-size", "4"]
    request.getfixturevalue("single")
    monkeypatch.setenv("WORLD_SIZE", "1")
    expected = made(open_run(load_config(stage, argv))).train_iters

    request.getfixturevalue("nothing_starts")
    assert main([stage, *argv, "--dry-run"]) == 0
    assert read_report(capsys.readouterr().out)["Schedule"]["iterations"].startswith(f"{expected}: 2.5 epochs of ")


def test_all_that_is_elsewhere_is_named_and_nothing_else_is_looked_at(dry_run):
    argv = ["--load", "/no/sft", "--finetune", "--reward-load", "/no/reward", "--prior-load", "/no/prior"]
    argv += ["--save", "/no/brain", "--auto-resume", "--train-data", "no/such-data", *size_flags()]
    argv += ["--seq-length", "128"]
    shown = dry_run(2, "brain", *argv)
    absent = shown["Not looked at, not on this machine"]
    for flag in ("--load /no/sft", "--reward-load /no/reward", "--prior-load /no/prior", "--save /no/brain"):
        assert f"- {flag}: " in absent
    assert "- --train-data no/such-data: " in absent
    assert shown["Schedule"]["iterations"].startswith("not known")
    assert "sizes are those of the configuration" in shown["Checked"]


def test_data_without_their_tokenizer_are_read_as_far_as_possible(dry_run, assets, tmp_path, monkeypatch, capsys):
    argv = sized("sft", "--train-data")
    shown = dry_run(1, *argv, f"{assets}/sft.jsonl")
    assert "sft.jsonl: more than its first record" in shown["Not looked at, not on this machine"]
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    assert main([*argv, str(tmp_path / "bad.jsonl"), "--dry-run"]) == 2
    assert f"{tmp_path}/bad.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["generate", "evaluate"])
def test_the_stages_that_do_not_train_have_a_dry_run_too(dry_run, assets, stage):
    argv = ["--load", f"{assets}/policy", "--prompts", f"{assets}/prompts.jsonl", "--output", "/no/o.json"]
    if stage == "evaluate":
        argv += ["--prior-load", f"{assets}/policy", "--reward-load", f"{assets}/reward"]
        argv += ["--posterior-samples", "64", "--posterior-prompts", "9", "--posterior-data", "/no/prior.jsonl"]
    shown = dry_run(2, stage, *argv, "--seq-length", "128", "--max-new-tokens", "16")
    assert shown["Schedule"]["prompts"] == "40"
    samples = "64 samples of the prior for each of the first 9 prompts, scored once, in /no/prior.jsonl"
    assert shown["Schedule"].get("posterior") == (samples if stage == "evaluate" else None)
    assert float(shown["Memory per GPU, on the fullest (estimate)"]["total"].split()[0]) < 1


def test_settings_that_are_not_the_defaults_are_listed_and_no_others(dry_run):
    shown = dry_run(1, *sized("sft", "--lr", "3e-4", "--bf16"))["Settings that differ from the defaults"]
    assert shown == {
        "bf16": "true",
        "tokenizer_model": "/no/tokenizer",
        "train_data": "/no/data.jsonl",
        "seq_length": "128",
        "lr": "0.0003",
    }


def test_memory_counts_a_reward_model_of_its_own_size(dry_run, assets, monkeypatch):
    write_checkpoint(assets / "small", stage="reward", head="reward", num_layers=2)
    seen = []

    def estimate(workload, layout, *, impl):
        seen.append({model.name: model.model.num_layers for model in workload.frozen_models})
        return Memory(phase="training", pipeline_stage=0)

    monkeypatch.setattr("megatron_brain.dry_run.report.estimate_memory", estimate)
    argv = ["--load", f"{assets}/policy", "--finetune", "--reward-load", f"{assets}/small", "--seq-length", "128"]
    dry_run(1, "brain", *argv, "--train-data", f"{assets}/prompts.jsonl")
    assert seen == [{"prior": 4, "reward": 2}]


def test_only_rank_0_prints_a_report(monkeypatch, capsys, nothing_starts):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*sized("sft"), "--dry-run"]) == 0
    assert not capsys.readouterr().out


def flags_of_mistakes(assets):
    """Settings a start refuses before it makes a process group, with a part of the message."""
    record = json.dumps({"prompt": "a", "completion": " b"})
    (assets / "one.jsonl").write_text(record + "\n")
    policy = ["--load", f"{assets}/policy"]
    sft = ["sft", "--train-data", f"{assets}/one.jsonl", "--seq-length", "64"]
    return {
        "a layout": ([*sft, *policy, "--finetune", "--tensor-model-parallel-size", "3"], "does not divide"),
        "a batch": ([*sft, *policy, "--finetune", "--global-batch-size", "7"], "is not a multiple of"),
        "a size": ([*sft, *policy, "--finetune", "--num-layers", "5"], "num_layers=5 was asked for"),
        "a stage": (["reward", *sft[1:], *policy], "cannot be resumed by reward"),
        "no checkpoint": ([*sft, "--load", f"{assets}/tokenizer", "--finetune"], "holds no checkpoint"),
        "a tokenizer": (
            [*sft, *size_flags(vocab_size=32), "--tokenizer-model", f"{assets}/tokenizer"],
            "needs a vocabulary of",
        ),
    }


@pytest.mark.parametrize("mistake", ["a layout", "a batch", "a size", "a stage", "no checkpoint", "a tokenizer"])
def test_what_a_start_refuses_is_refused_in_the_same_words(mistake, assets, monkeypatch, capsys, nothing_starts):
    argv, part = flags_of_mistakes(assets)[mistake]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    said = []
    for flags in (argv, [*argv, "--dry-run"]):
        assert main(flags) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert part in said[0]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--load", "/no/sft", "--finetune"], "--load /no/sft is not on this machine and the model's sizes"),
        (["--hf-model", "/no/hf"], "--hf-model /no/hf is not on this machine and the model's sizes"),
        (["--load", "policy", "--finetune", "--lr-warmup-iters", "9"], "less than the run's 5 iterations"),
        (["--load", "policy", "--finetune", "--log-metrics", "los"], "'all' shows all; did you mean 'loss'?"),
    ],
)
def test_what_a_dry_run_cannot_do_or_foresees_is_refused_with_a_cure(
    flags, part, assets, monkeypatch, capsys, nothing_starts
):
    monkeypatch.chdir(assets)
    monkeypatch.setenv("WORLD_SIZE", "1")
    argv = ["sft", *flags, "--train-data", "sft.jsonl", "--no-packing", "--seq-length", "128", "--dry-run"]
    assert main(argv) == 2
    assert part in capsys.readouterr().err


def test_all_files_of_rollouts_are_read_and_checked(dry_run, assets, tmp_path, capsys):
    response = {"tokens": [3], "log_proposal": -1.0, "log_prior": -1.0, "reward": 0.5}
    group = {"id": "a", "index": 0, "prompt_tokens": [1, 2], "responses": [response, response]}
    argv = ["brain", "--load", f"{assets}/policy", "--finetune", "--seq-length", "128", "--global-batch-size", "4"]
    argv += ["--rollout-data", f"{tmp_path}/*.jsonl"]
    for name, groups in (("a", 8), ("b", 8)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(group) + "\n") * groups)
    shown = dry_run(1, *argv)
    assert shown["Schedule"]["iterations"] == "4: 2 rounds of 2 steps"
    assert "2 rounds, 16 groups in all" in shown["Checked"]
    (tmp_path / "c.jsonl").write_text((json.dumps(group) + "\n") * 4)
    assert main([*argv, "--dry-run"]) == 2
    assert "c.jsonl holds 4 groups and" in capsys.readouterr().err

    with (tmp_path / "b.jsonl").open("a") as file:
        file.write(json.dumps(group) + "\n")
    assert main([*argv, "--dry-run"]) == 2
    assert "b.jsonl holds 9 groups, not a multiple of global_batch_size=4" in capsys.readouterr().err


def test_a_prior_that_is_a_reward_model_is_refused(assets, monkeypatch, capsys, nothing_starts):
    argv = ["brain", "--load", f"{assets}/policy", "--finetune", "--prior-load", f"{assets}/reward"]
    argv += ["--reward-load", f"{assets}/reward", "--train-data", f"{assets}/prompts.jsonl", "--seq-length", "128"]
    assert main([*argv, "--dry-run"]) == 2
    assert "holds a reward model, a policy model is needed here" in capsys.readouterr().err


def test_the_parts_of_the_reward_are_named_and_no_server_is_asked(assets, monkeypatch, capsys, nothing_starts):
    rewards = ["--reward-load", f"{assets}/reward", "--reward-function", "elsewhere/rule.py:right"]
    rewards += ["--reward-url", "http://nowhere.invalid/x", "--reward-weights", "1,0.5,-2"]
    argv = ["brain", "--load", f"{assets}/policy", "--finetune", "--train-data", f"{assets}/prompts.jsonl"]
    assert main([*argv, *rewards, "--seq-length", "128", "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "reward: reward + 0.5 x right + -2 x nowhere.invalid" in text
    assert "--reward-function elsewhere/rule.py: the code that it names" in text
    assert "--reward-url http://nowhere.invalid/x: whether it answers; a dry run asks no server" in text
