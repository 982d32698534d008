"""Tiny random Hugging Face models, and how they get into a chunk."""

import importlib
import shutil
from pathlib import Path

import pytest
from helpers.assets import write_assets
from helpers.hf_models import write_hf_model

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.conversion import load_hf_weights, read_hf_model
from megatron_brain.models.architecture import resolve
from megatron_brain.models.provider import build_model


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A tokenizer of 320 ids: padding 0, end of text 1."""
    directory = tmp_path_factory.mktemp("assets")
    write_assets(directory)
    return directory / "tokenizer"


@pytest.fixture
def write_hf(tmp_path, tokenizer_dir):
    """A function that writes a model of `helpers.hf_models` with a tokenizer and returns its directory."""

    def write(name: str = "hf", head: str = "policy", model: str = "llama", **changes) -> Path:
        directory = write_hf_model(tmp_path / name, model, head, **changes)
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, directory)
        return directory

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
        return importlib.import_module(f"megatron_brain.commands.{name}")

    return import_
