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
def letters(prompts, responses, records):
    return [text.count("e") / 8 for text in responses]
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
    """For each type: its name, a folder with the checkpoints `tied` and `untied`, and a server of the pretrained model."""
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
    folder = max((tmp_path / "sync").glob("*/*"))
    with served(folder, tmp_path, tokenizer=work / "hf", dtype=dtype) as fresh:
        theirs = greedy_answers(fresh, ours.ids, eos_id=run.tokenizer.eos_id, most=TOKENS)
    check_same(ours, theirs, "a fresh server", rounding=ROUNDING_OF[dtype])
