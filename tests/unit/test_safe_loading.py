"""Nothing a user was handed gets to run code: checkpoints, models, tokenizers, settings.

What a checkpoint's own files may not do: tests/unit/checkpointing/test_storage.py. That the package never unpickles
freely: ruff's rules S301 and S302, which `tests/run.sh` runs.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_tokenizers import write_hf_tokenizer
from transformers import AutoTokenizer

from megatron_brain.config.fields import all_fields
from megatron_brain.config.loader import load_config
from megatron_brain.conversion import read_hf_architecture
from megatron_brain.conversion.safetensors_files import SafetensorsReader
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def proof(tmp_path) -> Path:
    """A file that code, if it ran, would have made."""
    return tmp_path / "proof"


def write_code(folder: Path, proof: Path) -> None:
    (folder / "code.py").write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM): pass\n"
    )


def add_auto_map(path: Path, auto_map: dict, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map, **changes}))


def test_a_tokenizer_that_brings_code_does_not_run_it(tmp_path, proof):
    folder = tmp_path / "tokenizer"
    write_hf_tokenizer(folder, eos_token="</s>", pad_token="<pad>")
    write_code(folder, proof)
    auto_map = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    add_auto_map(folder / "tokenizer_config.json", auto_map, tokenizer_class="Tokenizer")
    try:
        build_tokenizer("HuggingFaceTokenizer", str(folder))
    except ConfigError as error:
        assert "AutoTokenizer cannot read it" in str(error)
    assert not proof.exists()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert proof.exists(), "the code would run if it were let"


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with a Llama's config.json and no weights."""
    from transformers import LlamaConfig

    folder = tmp_path / "model"
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaConfig(**sizes, vocab_size=64, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Model"])
def test_a_model_that_brings_code_does_not_run_it(model, proof, architecture):
    write_code(model, proof)
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    add_auto_map(model / "config.json", auto_map, architectures=[architecture])
    if architecture == "Model":
        with pytest.raises(ConfigError, match=r"architectures=\['Model'\] is not supported"):
            read_hf_architecture(model)
    else:
        assert read_hf_architecture(model)["hidden_size"] == 8
    assert not proof.exists()


def test_a_model_of_pickled_weights_is_refused(model):
    torch.save({"lm_head.weight": torch.zeros(64, 8)}, model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        SafetensorsReader(model)


def test_remote_code_cannot_be_allowed_by_a_file_or_a_flag(tmp_path):
    assert not [name for name in all_fields() if "remote" in str(name) or "pickle" in str(name)]
    settings = tmp_path / "sft.yaml"
    settings.write_text("train_data: t.jsonl\nload: ckpt\ntrust_remote_code: true\n")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_config("sft", ["--config", str(settings)])
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_config("sft", ["--train-data", "t.jsonl", "--load", "ckpt", "--trust-remote-code"])


def test_a_settings_file_makes_plain_values_only(tmp_path, proof):
    settings = tmp_path / "sft.yaml"
    settings.write_text(f"train_data: !!python/object/apply:os.system ['touch {proof}']\nload: ckpt\n")
    with pytest.raises(ConfigError, match="sft.yaml"):
        load_config("sft", ["--config", str(settings)])
    assert not proof.exists()


def test_the_rule_against_free_unpickling_finds_it(tmp_path):
    """The check that stands for the whole package can fail."""
    (tmp_path / "unsafe.py").write_text("import pickle\n\npickle.loads(b'')\n")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1 and "S301" in found.stdout


def test_nothing_is_loaded_by_torch_load():
    """safetensors reads tensors; no rule of ruff's covers torch.load yet."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("megatron_brain", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "load" and getattr(node.value, "id", None) == "torch"
    ]
    assert calls == []
