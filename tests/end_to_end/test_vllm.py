"""Runs with `--engine vllm` against real servers, which examples/vllm/serve.sh starts.

They run if VLLM_PYTHON is set, and those of a pretrained model if REAL_HF_MODEL and REAL_PROMPTS are; the head of
test_runs_elsewhere.py says how to get all three. They take some minutes:

    REAL_HF_MODEL=work/base REAL_PROMPTS=work/data/test.jsonl VLLM_PYTHON=work/vllm/bin/python \
        python -m pytest -s tests/end_to_end/test_vllm.py
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.assets import write_assets
from helpers.elsewhere import PROMPTS, ROUNDING, Answers, check_same, needs, stage, tool
from helpers.vllm_servers import greedy_answers, served

from megatron_brain.checkpointing import load_weights
from megatron_brain.config.stages import SamplingConfig
from megatron_brain.models.provider import Chunk
from megatron_brain.stages.answers import read_prompts
from megatron_brain.stages.engine import open_engine

ROOT = Path(__file__).parents[2]
TOKENS = 32

ROUNDING_OF = {"float32": ROUNDING, "bfloat16": 0.25}
"""Two tokens whose logits are closer than this may change places. bfloat16 has a step of 0.125 from 16 on, and what a
server computes there depends on which requests are in one batch."""

LOGPROBS_OF = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.5)}
"""Limits of the mean difference between log q' of trainer and server, per token, and of the largest of a token. Logits
from 16 to 32 have steps of 0.125 in bfloat16. The 135M model differs by 9e-6 and 3e-5 in float32, by 0.015 and 0.21 in
bfloat16."""

TINY = (
    *("--num-layers", "2", "--hidden-size", "128", "--ffn-hidden-size", "192", "--num-attention-heads", "4"),
    *("--num-query-groups", "2", "--vocab-size", "320", "--max-position-embeddings", "256"),
)
"""A model whose heads two ranks can divide, and of a size of heads that vLLM has for a CPU."""

LAYOUTS = {
    "one process": (1, ()),
    "DP2": (2, ()),
    "TP2": (2, ("--tensor-model-parallel-size", "2")),
    "PP2": (2, ("--pipeline-model-parallel-size", "2")),
}

REWARD = """
def vowels(prompts, responses, records):
    return [sum(letter in "aeiou" for letter in text) / 8 for text in responses]
"""
"""A rule that a random model learns in a few rounds."""


@torch.no_grad()
def change(chunks: list[Chunk], seed: int) -> None:
    """Change every weight by a twentieth of the spread of its tensor: enough for other answers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in chunks[0].parameters():
        noise = torch.randn(parameter.shape, generator=generator) * parameter.float().std() / 20
        parameter.add_(noise.to(parameter.dtype))


@pytest.fixture(scope="module", params=ROUNDING_OF)
def real(request, tmp_path_factory) -> Iterator[tuple[str, Path, str]]:
    """For each type: its name, a folder with the checkpoints `tied` and `untied`, and a server of the real model."""
    work, dtype = tmp_path_factory.mktemp("real"), request.param
    bf16 = ("--bf16",) if dtype == "bfloat16" else ()
    model = os.environ["REAL_HF_MODEL"]
    tool("convert_hf_to_megatron", "--hf-model", model, "--save", work / "tied", "--no-compare", *bf16)
    tool("convert_megatron_to_hf", "--load", work / "tied", "--save", work / "hf", "--untie", "--no-compare")
    tool("convert_hf_to_megatron", "--hf-model", work / "hf", "--save", work / "untied", "--no-compare", *bf16)
    with served(work / "hf", work, tokenizer=work / "hf", dtype=dtype) as url:
        yield dtype, work, url


@needs("VLLM_PYTHON", "REAL_HF_MODEL", "REAL_PROMPTS")
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_after_two_syncs_greedy_answers_are_those_of_a_fresh_server(name, real, tmp_path):
    """The server of both cases has an output layer of its own, and had other weights before."""
    dtype, work, url = real
    run = stage(
        *("generate", "--load", work / name, "--prompts", os.environ["REAL_PROMPTS"], "--max-prompts", PROMPTS),
        *("--output", tmp_path / "unwritten.jsonl", "--samples-per-prompt", 1, "--max-new-tokens", TOKENS),
        *("--temperature", 0, "--engine", "vllm", "--engine-url", url, "--engine-sync-dir", tmp_path / "sync"),
    )
    prompts = read_prompts(run)
    chunks = run.build_model("policy")
    load_weights(run.start_from, chunks, head="policy")
    engine = open_engine(run, prompts)
    asked = SamplingConfig(temperature=0.0, max_new_tokens=TOKENS)
    answers, seconds = [], []
    for number in range(3):
        if number:
            change(chunks, number)
        start = time.perf_counter()
        engine.take_weights(chunks, f"change {number}")
        seconds.append(time.perf_counter() - start)
        drawn = engine.sample([p.tokens for p in prompts], seeds=[[i] for i in range(PROMPTS)], sampling=asked)
        answers.append([samples[0] for samples in drawn])
    ours = Answers(run=run, chunks=chunks, prompts=prompts, samples=answers[-1])
    same = [sum(a.tokens == b.tokens for a, b in zip(answers[i], answers[-1], strict=True)) for i in (0, 1)]
    print(f"\n{dtype}, {name}: syncs of {', '.join(f'{each:.2f}' for each in seconds)} s; {same} answers as before")
    assert max(same) < PROMPTS / 2, "the weights hardly changed"
    assert len({sample.tokens for sample in ours.samples}) > PROMPTS / 2, "the changed model says always the same"
    folder = max((tmp_path / "sync").glob("*/*"))
    with served(folder, tmp_path, tokenizer=work / "hf", dtype=dtype) as fresh:
        theirs = greedy_answers(fresh, ours.ids, eos_id=run.tokenizer.eos_id, most=TOKENS)
    check_same(ours, theirs, "a fresh server", rounding=ROUNDING_OF[dtype])


def run(*command: object, processes: int = 1) -> str:
    """Run a stage as the command does. Returns what it printed."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    done = subprocess.run(
        [sys.executable, *map(str, (*launcher, "-m", "megatron_brain", *command, "--no-progress"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def make_reward(work: Path) -> str:
    """The rule REWARD as the value of --reward-function."""
    (work / "rule.py").write_text(REWARD, encoding="utf-8")
    return f"{work / 'rule.py'}:vowels"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A folder with the checkpoint `base` of a random model and prompts, and a server of the model."""
    work = tmp_path_factory.mktemp("tiny")
    write_assets(work)
    run(
        *("sft", *TINY, "--init-method-std", 0.1, "--tokenizer-model", work / "tokenizer", "--save", work / "base"),
        *("--train-data", work / "sft.jsonl", "--train-iters", 1, "--global-batch-size", 4, "--lr", 1e-9),
        *("--seq-length", 64),
    )
    tool("convert_megatron_to_hf", "--load", work / "base", "--save", work / "hf", "--untie", "--no-compare")
    with served(work / "hf", work, tokenizer=work / "hf", longest=256) as url:
        yield work, url


def expect_rounds(output: str, folder: Path, *, rounds: int, steps: int, dtype: str = "float32") -> None:
    """Check that every step was logged, and that the weights of every round were handed over and verified."""
    mean, largest = LOGPROBS_OF[dtype]
    logged = metrics(folder)
    assert [line["iteration"] for line in logged if "loss" in line] == list(range(1, steps + 1))
    refreshed = [line for line in logged if "seconds_weight_sync" in line]
    assert len(refreshed) == rounds
    for line in refreshed:
        assert line["seconds_weight_sync"] > 0 and line["seconds_waiting_for_samples"] >= 0
        assert 0 <= line["sampler_logprob_difference"] <= line["sampler_logprob_largest_difference"] < largest
        assert line["sampler_logprob_difference"] < mean
    assert output.count("1 vLLM servers hold the weights of ") == rounds, output[-3000:]
    difference = max(line["sampler_logprob_difference"] for line in refreshed)
    seconds = ", ".join(f"{line['seconds_weight_sync']:.2f}" for line in refreshed)
    print(f"\n{folder.name}: trainer and server differ by {difference:.1e} nats a token; syncs of {seconds} s")


@needs("VLLM_PYTHON")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounds_run_at_every_layout_with_verified_weights(layout, ahead, tiny, tmp_path):
    (work, url), (processes, flags) = tiny, LAYOUTS[layout]
    output = run(
        *("brain", "--load", work / "base", "--finetune", "--save", tmp_path / layout.replace(" ", "_"), *flags),
        *("--train-data", work / "prompts.jsonl", "--reward-function", make_reward(tmp_path), "--lr", 1e-3),
        *("--prompts-per-round", 8, "--samples-per-prompt", 4, "--max-new-tokens", 8, "--seq-length", 64),
        *("--global-batch-size", 4, "--micro-batch-size", 2, "--train-iters", 6, "--rounds-ahead", ahead),
        *("--engine", "vllm", "--engine-url", url, "--engine-sync-dir", tmp_path / "sync"),
        processes=processes,
    )
    expect_rounds(output, tmp_path / layout.replace(" ", "_"), rounds=3, steps=6)


@needs("VLLM_PYTHON", "REAL_HF_MODEL", "REAL_PROMPTS")
@pytest.mark.parametrize("layout", ["one process", "DP2", "PP2"])
def test_rounds_of_a_real_model_run(layout, real, tmp_path):
    """Its nine heads cannot be divided by two ranks."""
    (dtype, work, url), (processes, flags) = real, LAYOUTS[layout]
    bf16 = ("--bf16",) if dtype == "bfloat16" else ()
    output = run(
        *("brain", "--load", work / "tied", "--finetune", "--save", tmp_path / layout.replace(" ", "_"), *flags),
        *("--train-data", os.environ["REAL_PROMPTS"], "--max-train-records", 8, "--max-new-tokens", 8, "--lr", 1e-5),
        *("--reward-function", make_reward(tmp_path), "--no-save-optim", "--seq-length", 256),
        *("--prompts-per-round", 4, "--samples-per-prompt", 2, "--global-batch-size", 4, "--micro-batch-size", 2),
        *("--train-iters", 2, *bf16, "--engine", "vllm", "--engine-url", url, "--engine-sync-dir", tmp_path / "sync"),
        processes=processes,
    )
    expect_rounds(output, tmp_path / layout.replace(" ", "_"), rounds=2, steps=2, dtype=dtype)


@needs("VLLM_PYTHON")
def test_a_rule_is_learned_as_with_the_native_engine(tiny, tmp_path):
    """The two engines draw other samples of the same policies, so over seeds their curves differ by chance alone.

    A curve is summed up as the mean reward of the rounds after the first. The difference of the engines' means lies in
    Student's 99% interval of two samples of 3 with one variance (4 degrees of freedom: 4.60).
    """
    work, url = tiny
    servers = ("--engine", "vllm", "--engine-url", url, "--engine-sync-dir", tmp_path / "sync")
    curves: dict[str, list[list[float]]] = {}
    for engine, flags in {"native": (), "vllm": servers}.items():
        for seed in (1, 2, 3):
            folder = tmp_path / f"{engine}_{seed}"
            run(
                *("brain", "--load", work / "base", "--finetune", "--save", folder, "--seed", seed, "--no-save-optim"),
                *("--train-data", work / "prompts.jsonl", "--reward-function", make_reward(tmp_path)),
                *("--reward-temperature", 0.15, "--lr", 2e-3, "--lr-decay-style", "constant", "--seq-length", 64),
                *("--prompts-per-round", 32, "--samples-per-prompt", 8, "--max-new-tokens", 8),
                *("--global-batch-size", 8, "--micro-batch-size", 8, "--refresh-interval", 4, "--train-iters", 24),
                *flags,
            )
            found = [line["reward/vowels"] for line in metrics(folder) if "reward/vowels" in line]
            print(f"\n{engine}, seed {seed}: {', '.join(f'{reward:.3f}' for reward in found)}")
            curves.setdefault(engine, []).append(found)
    means = {engine: [statistics.mean(found[1:]) for found in runs] for engine, runs in curves.items()}
    start = statistics.mean(found[0] for runs in curves.values() for found in runs)
    difference = statistics.mean(means["vllm"]) - statistics.mean(means["native"])
    variance = statistics.mean(statistics.variance(each) for each in means.values())
    half = 4.60 * math.sqrt(2 * variance / 3)
    print(f"means {means}, first round {start:.3f}: difference {difference:+.4f}, interval +-{half:.4f}")
    risen = statistics.mean(means["native"]) - start
    assert risen > 0.1 and half < risen / 2, "the runs are too unlike to tell anything"
    assert abs(difference) <= half
