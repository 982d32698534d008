"""Tiny random Hugging Face models, larger weights than usual so that nothing agrees by being near zero."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from helpers.assets import write_assets
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.conversion import load_hf_weights, read_hf_model
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model

SIZES = {
    "vocab_size": 330,  # not a multiple of 128: the last rows of our embedding are padding
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A tokenizer of 320 ids: padding 0, end of text 1."""
    directory = tmp_path_factory.mktemp("assets")
    write_assets(directory)
    return directory / "tokenizer"


@pytest.fixture
def write_hf(tmp_path, tokenizer_dir):
    """A function that writes a model with SIZES changed and returns its directory."""

    def write(name: str = "hf", head: str = "policy", **changes) -> Path:
        torch.manual_seed(3)
        if head == "policy":
            model = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
        else:
            model = LlamaForSequenceClassification(LlamaConfig(**SIZES | {"num_labels": 1} | changes))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(tmp_path / name)
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def load(single):
    """A function that loads a Hugging Face directory into one process: the model's sizes and its chunk."""

    def load_(directory: Path, head: str | None = None, **settings):
        source = read_hf_model(directory)
        model = resolve(ModelConfig(**settings), source.architecture, str(directory))
        head = head or source.head
        chunks = build_model(model, ParallelConfig(), single, head=head, seed=9)
        load_hf_weights(directory, chunks, model, head)
        return model, chunks[0].eval()

    return load_


@pytest.fixture
def tool():
    """A function that imports a script of tools/ by its name."""

    def import_(name: str):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return import_
