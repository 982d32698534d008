"""Exports give the same ids, texts, chats and logits in the oldest transformers that setup.py allows as in the newest.

python3.11 -m venv work/oldest
work/oldest/bin/pip install torch==2.13.0 transformers==4.56.0
OLDEST_TRANSFORMERS=work/oldest/bin/python python -m pytest -s tests/end_to_end/test_oldest_transformers.py
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hf_models import HF_MODELS, write_hf_model
from helpers.tiny_tokenizers import CHATML, train_sentencepiece, write_hf_tokenizer, write_qwen2_tokenizer

from megatron_brain.data.tokenizer import SentencePieceTokenizer
from megatron_brain.data.tokenizer.awkward_texts import AWKWARD_TEXTS

ROOT = Path(__file__).parents[2]
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<think>"]
CHAT = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "fine!"}]
FAMILIES = [name for name in HF_MODELS if name not in ("llama3", "gpt_neox_serial")]

pytestmark = pytest.mark.skipif(
    "OLDEST_TRANSFORMERS" not in os.environ,
    reason="set OLDEST_TRANSFORMERS to the python of an environment with the oldest transformers that setup.py allows",
)


def tool(name, *flags):
    module = importlib.import_module(f"megatron_brain.commands.{name}")
    assert module.main([*map(str, flags)]) == 0


def export(folder, family, head, make_tokenizer):
    """Export a tiny model of a family that went through a checkpoint."""
    write_hf_model(folder / "hf", family, head, vocab_size=340)
    make_tokenizer(folder / "hf")
    tool("convert_hf_to_megatron", "--hf-model", folder / "hf", "--save", folder / "checkpoint")
    tool("convert_megatron_to_hf", "--load", folder / "checkpoint", "--save", folder / "out")
    return str(folder / "out")


def byte_level(folder):
    write_hf_tokenizer(
        folder,
        special=SPECIAL,
        add_bos=False,
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<think>"],
        chat_template=CHATML,
    )


def qwen2(folder):
    write_qwen2_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHATML)


def sentencepiece(folder):
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "pad_id": 0, "eos_id": 1}
    model = train_sentencepiece(folder, bos_id=2, unk_id=3, **settings)
    SentencePieceTokenizer(model).export(folder, "policy")
    (folder / "chat_template.jinja").write_text(CHATML)


def read(python, folder, questions):
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    done = subprocess.run(
        [
            python,
            ROOT / "tests" / "helpers" / "read_with_transformers.py",
            folder / "questions.json",
            folder / "a.json",
        ],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "a.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The answers of the oldest and of the installed transformers to every export."""
    folder = tmp_path_factory.mktemp("exports")
    made = {
        head: [
            export(folder / f"{family}_{head}", family, head, qwen2 if family == "qwen2" else byte_level)
            for family in FAMILIES
        ]
        for head in ("policy", "reward")
    }
    made["policy"].append(export(folder / "sentencepiece", "llama", "policy", sentencepiece))
    made["reward"].append(export(folder / "sentencepiece_reward", "llama", "reward", sentencepiece))
    questions = {
        "texts": [*AWKWARD_TEXTS, "a</s> b<|im_start|>c<|im_end|> <think>", "<s>a"],
        "chats": [CHAT],
        "ids": [[40, 41, 42, 43, 300, 301, 1], [77, 5, 8, 1]],
        "policies": made["policy"],
        "rewards": made["reward"],
    }
    return [read(python, folder, questions) for python in (os.environ["OLDEST_TRANSFORMERS"], sys.executable)]


def test_the_environment_has_the_oldest_version_that_setup_allows(answers):
    allowed = re.search(r'"transformers>=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    assert answers[0]["transformers"].startswith(allowed) and answers[1]["transformers"] != answers[0]["transformers"]


def test_ids_texts_and_chats_are_the_same(answers):
    oldest, newest = answers
    directories = [name for name in newest if name not in ("transformers", "warnings")]
    assert len(directories) == 2 * len(FAMILIES) + 2
    for name in directories:
        for what in ("texts", "literal", "decoded", "chats"):
            assert oldest[name][what] == newest[name][what], (name, what)


def test_logits_and_rewards_are_the_same(answers):
    oldest, newest = answers
    for name in newest.keys() - {"transformers", "warnings"}:
        for old, new in zip(oldest[name]["values"], newest[name]["values"], strict=True):
            old, new = (values if isinstance(values[0], list) else [values] for values in (old, new))
            largest = max(1.0, max(abs(value) for row in new for value in row))
            difference = max(
                abs(a - b) for row, other in zip(old, new, strict=True) for a, b in zip(row, other, strict=True)
            )
            assert difference <= 1e-5 * largest, (name, difference)


def test_nothing_of_what_is_written_is_complained_of(answers):
    assert [text for text in answers[0]["warnings"] if "regex" in text or "special" in text] == []
