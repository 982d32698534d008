"""generation_config.json comes from a Hugging Face directory and stays with the checkpoints of its runs."""

import json

import pytest
from helpers.assets import write_assets
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_brain.checkpointing import read_info
from megatron_brain.config.loader import load_config
from megatron_brain.conversion.generation_config import read_generation_config
from megatron_brain.errors import ConfigError
from megatron_brain.stages.sft.stage import SFTStage
from megatron_brain.training.start import open_run
from megatron_brain.training.trainer import Trainer

SAID = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}


def test_a_directory_without_the_file_says_nothing(tmp_path):
    assert read_generation_config(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json is not"):
        read_generation_config(tmp_path)


def test_what_the_model_said_is_in_the_checkpoints_of_its_runs_and_of_those_that_start_from_them(single, tmp_path):
    write_assets(tmp_path)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512)).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(SAID))
    starts = (["--hf-model", "hf"], ["--load", "first", "--finetune"], ["--load", "second"])
    for start, save in zip(starts, ("first", "second", "third"), strict=True):
        flags = [
            *("--train-data", str(tmp_path / "sft.jsonl"), "--seq-length", "32", "--train-iters", "2", "--no-progress"),
            *("--global-batch-size", "1", "--micro-batch-size", "1", "--lr", "1e-3"),
            *("--tokenizer-model", str(tmp_path / "tokenizer"), "--save", str(tmp_path / save)),
            *(start[0], str(tmp_path / start[1]), *start[2:]),
        ]
        run = open_run(load_config("sft", flags))
        Trainer(run, SFTStage(run)).save()
        assert read_info(tmp_path / save).generation_config == SAID
