"""A pretrained model of a real vocabulary gives the same samples at every layout, and rounding changes no draw.

    REAL_HF_MODEL=work/base REAL_PROMPTS=work/data/test.jsonl python -m pytest -s tests/end_to_end/test_same_samples.py

tests/end_to_end/test_runs_elsewhere.py says how to get model and prompts. The model must have a head count that three
tensor-parallel ranks can share and a layer count that three pipeline stages can (SmolLM2-135M has 9 and 30). On an idle
machine of two cores all takes about ten minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.debian_tldr import read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_brain.generation.choose import choose_tokens

pytestmark = pytest.mark.skipif(
    not {"REAL_HF_MODEL", "REAL_PROMPTS"} <= os.environ.keys(),
    reason="set REAL_HF_MODEL to the directory of a pretrained language model, "
    'REAL_PROMPTS to a jsonl file of {"prompt", "completion"} records',
)

ROOT = Path(__file__).parents[2]
PROMPTS, SAMPLES, TOKENS = 16, 16, 48
LAYOUTS = {
    "TP3": ("--tensor-model-parallel-size", "3"),
    "PP3": ("--pipeline-model-parallel-size", "3"),
    "DP3": (),
}
SETTINGS = {
    "temperature 1": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "temperature 0.7": {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
    "top-p 0.9": {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
}
ROWS, BATCHES, DRAWS = 128, 49, 4
"""Positions of texts at one time, and in how many parts; draws from each with each of the settings: 100,352 in all."""


def run(*command: object) -> None:
    """Run a Python script of the checkout."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with the checkpoint and the prompts."""
    work = tmp_path_factory.mktemp("real")
    write_jsonl(work / "prompts.jsonl", read_jsonl(Path(os.environ["REAL_PROMPTS"]))[:PROMPTS])
    run("tools/convert_hf_to_megatron.py", "--hf-model", os.environ["REAL_HF_MODEL"], "--save", work / "policy")
    return work


def draw(work: Path, name: str, processes: int, *flags: str) -> list[list[list]]:
    """Tokens and log-probability of every sample of every prompt, in float32."""
    output = work / f"{name}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    run(
        *(*launcher, "tests/helpers/draw_tokens.py", "--load", work / "policy", "--prompts", work / "prompts.jsonl"),
        *("--output", output, "--samples-per-prompt", SAMPLES, "--max-new-tokens", TOKENS, "--temperature", 1.0),
        *("--sampling-batch-size", 64, *flags),
    )
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(work) -> list[list[list]]:
    """The samples of one process."""
    return draw(work, "alone", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_tokens_of_one_process(work, alone, layout):
    found = draw(work, layout, 3, *LAYOUTS[layout])
    assert [len(samples) for samples in found] == [SAMPLES] * PROMPTS
    differing, largest = [], 0.0
    for prompt, (mine, theirs) in enumerate(zip(found, alone, strict=True)):
        for sample, ((tokens, logprob), (expected, expected_logprob)) in enumerate(zip(mine, theirs, strict=True)):
            if tokens != expected:
                place = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
                differing.append(f"prompt {prompt}, sample {sample}, token {place}")
            else:
                largest = max(largest, abs(logprob - expected_logprob))
    drawn = sum(len(tokens) for samples in alone for tokens, _ in samples)
    print(f"{layout}: {drawn} tokens, {len(differing)} samples differ; log-probabilities within {largest:.1e}")
    assert not differing
    assert largest < 2e-3


@pytest.fixture(scope="module")
def head() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[N, h]` that predict the tokens of real records, and the output layer `[V, h]`."""
    directory = os.environ["REAL_HF_MODEL"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    states, count = [], 0
    for record in read_jsonl(Path(os.environ["REAL_PROMPTS"])):
        ids = tokenizer(record["prompt"] + record["completion"]).input_ids[:512]
        with torch.no_grad():
            states.append(model.model(torch.tensor([ids])).last_hidden_state[0])
        count += len(ids)
        if count >= ROWS * BATCHES + 2:
            break
    return torch.cat(states), model.lm_head.weight.detach()


@pytest.mark.parametrize("vocabulary", ["the model's", "131,072"])
def test_noise_of_1e_6_changes_at_most_one_draw_of_100_000(head, vocabulary):
    """The second vocabulary joins the log-probabilities at three positions of a text and keeps the first 131,072."""
    states, weight = head
    generator = torch.Generator().manual_seed(1)
    changed = dict.fromkeys(SETTINGS, 0)
    for start in range(0, ROWS * BATCHES, ROWS):
        logits = states[start : start + ROWS] @ weight.t()
        if vocabulary == "131,072":
            following = [states[start + i : start + i + ROWS] @ weight.t() for i in (1, 2)]
            logits = torch.cat([part.log_softmax(dim=1) for part in (logits, *following)], dim=1)[:, :131072]
        moved = logits + torch.randn(logits.shape, generator=generator) * 1e-6
        for name, settings in SETTINGS.items():
            for step in range(DRAWS):
                seeds = torch.randint(0, 2**62, (ROWS,), generator=generator)
                first, second = (choose_tokens(rows.clone(), seeds, step, **settings)[0] for rows in (logits, moved))
                changed[name] += int((first != second).sum())
    draws = ROWS * BATCHES * DRAWS * len(SETTINGS)
    print(f"{logits.size(1)} ids: of {draws} draws changed {changed}")
    assert sum(changed.values()) <= 1e-5 * draws
