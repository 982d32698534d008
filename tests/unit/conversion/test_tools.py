"""The two tools: a checkpoint and back, exit statuses, and nothing left that looks complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from megatron_brain.checkpointing import read_info

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_a_model_goes_through_a_checkpoint_bit_equal(head, write_hf, tool, tmp_path, capsys):
    source, checkpoint, out = write_hf(head=head), tmp_path / "checkpoint", tmp_path / "out"
    assert tool("convert_hf_to_megatron").main(["--hf-model", str(source), "--save", str(checkpoint)]) == 0
    info = read_info(checkpoint)
    assert (info.head, info.iteration, info.has_optimizer) == (head, 0, False)
    assert tool("convert_megatron_to_hf").main(["--load", str(checkpoint), "--save", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("largest difference of the " + ("logits" if head == "policy" else "rewards")) == 2
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert not list(tmp_path.glob("*.unverified"))


def test_end_of_text_and_padding_reach_generation_config_and_a_chat_template_survives(write_hf, tool, tmp_path):
    source, checkpoint, out = write_hf(), tmp_path / "checkpoint", tmp_path / "out"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert tool("convert_hf_to_megatron").main(["--hf-model", str(source), "--save", str(checkpoint)]) == 0
    assert tool("convert_megatron_to_hf").main(["--load", str(checkpoint), "--save", str(out)]) == 0
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.eos_token_id, settings.pad_token_id) == (1, 0)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"


@pytest.mark.parametrize("bf16", [False, True])
def test_type_of_the_written_weights_is_the_checkpoints_or_chosen(bf16, write_hf, tool, tmp_path):
    source, checkpoint = write_hf(), tmp_path / "checkpoint"
    flags = ["--bf16"] if bf16 else []
    assert tool("convert_hf_to_megatron").main(["--hf-model", str(source), "--save", str(checkpoint), *flags]) == 0
    export = tool("convert_megatron_to_hf")
    for name, flags in (("default", []), ("bfloat16", ["--dtype", "bfloat16"])):
        assert export.main(["--load", str(checkpoint), "--save", str(tmp_path / name), *flags]) == 0
        tensors = load_file(tmp_path / name / "model.safetensors").values()
        expected = torch.bfloat16 if bf16 or flags else torch.float32
        assert {tensor.dtype for tensor in tensors} == {expected}


def test_past_the_tolerance_the_tools_fail_and_name_the_layer(write_hf, tool, tmp_path, capsys, monkeypatch):
    source = write_hf()
    module = tool("convert_hf_to_megatron")
    right = module.load_weights

    def wrong(info, chunks, *, head):
        right(info, chunks, head=head)
        chunks[0].decoder.layers[1].mlp.linear_fc1.weight.data.mul_(1.01)

    monkeypatch.setattr(module, "load_weights", wrong)
    assert module.main(["--hf-model", str(source), "--save", str(tmp_path / "checkpoint")]) == 1
    said = capsys.readouterr().err
    assert "layer 1 is the first after which hidden states differ" in said
    assert not (tmp_path / "checkpoint").exists()
    assert (tmp_path / "checkpoint.unverified").is_dir()
    monkeypatch.undo()
    assert module.main(["--hf-model", str(source), "--save", str(tmp_path / "checkpoint")]) == 0
    assert not (tmp_path / "checkpoint.unverified").exists()


def test_mistakes_are_told_and_change_nothing(write_hf, tool, tmp_path, capsys):
    to_megatron, to_hf = tool("convert_hf_to_megatron"), tool("convert_megatron_to_hf")
    source = write_hf()
    kept = (source / "config.json").read_text()
    for run, flags, message in (
        (to_megatron, ["--hf-model", str(tmp_path / "none"), "--save", str(tmp_path / "x")], "is not a directory"),
        (to_megatron, ["--hf-model", str(source), "--save", str(source)], "is not empty"),
        (to_hf, ["--load", str(tmp_path / "none"), "--save", str(tmp_path / "x")], "does not exist"),
        (to_hf, ["--load", str(source), "--save", str(tmp_path / "x")], "holds no checkpoint"),
    ):
        assert run.main(flags) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    assert (source / "config.json").read_text() == kept
    config = json.loads(kept)
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert to_megatron.main(["--hf-model", str(source), "--save", str(tmp_path / "x")]) == 2
    assert "needs a vocabulary of 320" in capsys.readouterr().err


def test_the_tool_runs_by_itself_as_one_process(write_hf, tmp_path):
    ran = subprocess.run(
        [sys.executable, TOOLS / "convert_hf_to_megatron.py", "--hf-model", write_hf(), "--save", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "largest difference of the logits" in ran.stdout
