"""The two tools: a checkpoint and back, exit statuses, what they say, and nothing left that looks complete."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hf_models import HF_MODELS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_brain.checkpointing import read_info
from megatron_brain.conversion import to_checkpoint, to_hf

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture
def into(tool):
    """Runs the tool that converts to a checkpoint; returns its exit status."""
    main = tool("convert_hf_to_megatron").main
    return lambda source, save, *flags: main(["--hf-model", str(source), "--save", str(save), *flags])


@pytest.fixture
def out_of(tool):
    """Runs the tool that converts to a Hugging Face directory; returns its exit status."""
    main = tool("convert_megatron_to_hf").main
    return lambda load, save, *flags: main(["--load", str(load), "--save", str(save), *flags])


@pytest.mark.parametrize("name", HF_MODELS)
@pytest.mark.parametrize("head", ["policy", "reward"])
def test_a_model_goes_through_a_checkpoint_bit_equal(name, head, write_hf, into, out_of, tmp_path, capsys):
    source, checkpoint, out = write_hf(model=name, head=head), tmp_path / "checkpoint", tmp_path / "out"
    assert into(source, checkpoint) == 0
    info = read_info(checkpoint)
    assert (info.head, info.iteration, info.has_optimizer) == (head, 0, False)
    assert out_of(checkpoint, out) == 0
    said = capsys.readouterr().out
    assert said.count("largest difference of the " + ("logits" if head == "policy" else "rewards")) == 2
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert not list(tmp_path.glob("*.unverified"))


@pytest.mark.parametrize("name", HF_MODELS)
def test_an_untied_export_of_a_tied_model_has_its_output_layer_and_computes_the_same(
    name, write_hf, into, out_of, tmp_path, capsys
):
    source, checkpoint, out = write_hf(model=name, tie_word_embeddings=True), tmp_path / "checkpoint", tmp_path / "out"
    assert into(source, checkpoint, "--no-compare") == 0
    capsys.readouterr()
    assert out_of(checkpoint, out, "--untie") == 0
    assert "largest difference of the logits" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    [output] = after.keys() - before.keys()
    [embedding] = [key for key in before if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))]
    assert torch.equal(after[output], before[embedding])
    assert all(torch.equal(before[key], after[key]) for key in before)
    # transformers reads the output layer that was written.
    save_file({**after, output: after[output] + 1}, out / "model.safetensors", {"format": "pt"})
    logits = [AutoModelForCausalLM.from_pretrained(path)(torch.tensor([[5, 6]])).logits for path in (source, out)]
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_the_comparison_finds_an_output_layer_that_an_untied_export_has_otherwise(
    write_hf, into, out_of, tmp_path, capsys, monkeypatch
):
    assert into(write_hf(tie_word_embeddings=True), tmp_path / "checkpoint", "--no-compare") == 0
    monkeypatch.setattr(to_hf, "write_safetensors", broken(to_hf.write_safetensors, "lm_head.weight"))
    assert out_of(tmp_path / "checkpoint", tmp_path / "out", "--untie") == 1
    assert "hidden states agree everywhere" in capsys.readouterr().err


def test_untie_changes_nothing_in_an_untied_policy_and_is_refused_for_a_reward_model(
    write_hf, into, out_of, tmp_path, capsys
):
    source = write_hf(tie_word_embeddings=False)
    assert into(source, tmp_path / "checkpoint", "--no-compare") == 0
    assert out_of(tmp_path / "checkpoint", tmp_path / "out", "--untie", "--no-compare") == 0
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert into(write_hf("hf_reward", head="reward"), tmp_path / "reward", "--no-compare") == 0
    capsys.readouterr()
    assert out_of(tmp_path / "reward", tmp_path / "reward_out", "--untie") == 2
    assert "is a reward model, which has no output layer to untie; drop the flag" in capsys.readouterr().err


def test_a_chat_template_survives(write_hf, into, out_of, tmp_path):
    source = write_hf()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert into(source, tmp_path / "checkpoint", "--no-compare") == 0
    assert out_of(tmp_path / "checkpoint", tmp_path / "out", "--no-compare") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


@pytest.mark.parametrize("bf16", [False, True])
def test_type_of_the_written_weights_is_the_checkpoints_or_chosen(bf16, write_hf, into, out_of, tmp_path):
    assert into(write_hf(), tmp_path / "checkpoint", *(["--bf16"] if bf16 else [])) == 0
    for name, flags in (("default", []), ("bfloat16", ["--dtype", "bfloat16"])):
        assert out_of(tmp_path / "checkpoint", tmp_path / name, *flags) == 0
        tensors = load_file(tmp_path / name / "model.safetensors").values()
        expected = torch.bfloat16 if bf16 or flags else torch.float32
        assert {tensor.dtype for tensor in tensors} == {expected}


def test_the_last_line_says_size_time_speed_and_comparison(write_hf, into, out_of, tmp_path, capsys, monkeypatch):
    assert into(write_hf(), tmp_path / "compared") == 0
    compared = capsys.readouterr().out.strip()
    pattern = r": 0\.00 GB in \d+\.\d\d s \(\d+\.\d\d GB/s\); "
    assert re.search(pattern + r"largest difference of the logits at 192 random positions: ", compared)
    assert out_of(tmp_path / "compared", tmp_path / "not_compared", "--no-compare") == 0
    not_compared = capsys.readouterr().out.strip()
    assert re.search(pattern + r"not compared with transformers \(--no-compare\)$", not_compared)

    monkeypatch.syspath_prepend(TOOLS)
    benchmark = importlib.import_module("benchmarks.convert")
    # A comparison of so small a model may take less than the 0.1 s that the line tells.
    read = benchmark.Run.of(re.sub(r"\d+\.\d s$", "1.5 s", compared), 3.0, [7])
    assert (read.process_seconds, read.peak_bytes, read.comparison_seconds) == (3.0, [7], 1.5)
    assert 0 <= read.difference < 1e-5
    assert benchmark.Run.of(not_compared, 3.0, [7]).difference is None


def test_the_benchmark_finds_files_that_did_not_come_back(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    benchmark = importlib.import_module("benchmarks.convert")
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
        for name in "abc":
            save_file({name: torch.ones(3)}, tmp_path / folder / f"{name}.safetensors")
    assert benchmark.differences(tmp_path / "before", tmp_path / "after") == []
    save_file({"a": torch.tensor([1.0, 1.0, 2.0])}, tmp_path / "after" / "a.safetensors")
    (tmp_path / "after" / "b.safetensors").unlink()
    (tmp_path / "before" / "c.safetensors").unlink()
    found = benchmark.differences(tmp_path / "before", tmp_path / "after")
    assert [said.split()[0] for said in found] == ["a.safetensors", "b.safetensors", "c.safetensors"]


def broken(write, name):
    """A function that writes a file as `write` does, but for one weight among its tensors or boxes."""

    def wrong(values, path, **options):
        tensors = values if isinstance(values, dict) else {box.key: box.data for box in values}
        tensors[name].mul_(1.01)
        return write(values, path, **options)

    return wrong


@pytest.mark.parametrize("direction", ["into", "out_of"])
def test_past_the_tolerance_the_tools_fail_and_name_the_layer(
    direction, write_hf, into, out_of, tmp_path, capsys, monkeypatch
):
    """A weight is wrong in the files that are written."""
    source, final = write_hf(), tmp_path / "final"
    if direction == "into":
        run, module, function = into, to_checkpoint, "write_file"
        wrong = "decoder.layers.1.mlp.linear_fc1.weight"
    else:
        assert into(source, tmp_path / "checkpoint") == 0
        run, module, function, source = out_of, to_hf, "write_safetensors", tmp_path / "checkpoint"
        wrong = "model.layers.1.mlp.gate_proj.weight"
    monkeypatch.setattr(module, function, broken(getattr(module, function), wrong))
    assert run(source, final) == 1
    said = capsys.readouterr().err
    assert "layer 1 is the first after which hidden states differ" in said
    assert f"{final}.unverified: the logits differ by up to" in said
    assert not final.exists()
    assert (tmp_path / "final.unverified").is_dir()
    assert run(source, final, "--tolerance", "1") == 0
    final.rename(tmp_path / "wrong")
    monkeypatch.undo()
    assert run(source, final) == 0
    assert not (tmp_path / "final.unverified").exists()


def test_mistakes_are_told_and_change_nothing(write_hf, into, out_of, tmp_path, capsys):
    source, nowhere = write_hf(), tmp_path / "x"
    kept = (source / "config.json").read_text()
    for run, given, save, message in (
        (into, tmp_path / "none", nowhere, "is not a directory"),
        (into, source, source, "is not empty"),
        (out_of, tmp_path / "none", nowhere, "does not exist"),
        (out_of, source, nowhere, "holds no checkpoint"),
    ):
        assert run(given, save) == 2
        assert message in capsys.readouterr().err
        assert not nowhere.exists()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert into(source, tmp_path / "link") == 2
    assert f"is a link: give the folder itself, {tmp_path / 'folder'}" in capsys.readouterr().err
    assert (source / "config.json").read_text() == kept
    config = json.loads(kept)
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert into(source, nowhere) == 2
    assert "needs a vocabulary of 320" in capsys.readouterr().err


def test_what_a_mismatch_left_is_not_removed_to_be_read(write_hf, into, out_of, tmp_path, capsys):
    save = tmp_path / "out"
    left = tmp_path / "out.unverified"
    assert into(write_hf(), left) == 0
    for checkpoint in (left, left / "iter_0000000"):
        assert out_of(checkpoint, save) == 2
        assert f"{checkpoint} would be removed to make --save {save}" in capsys.readouterr().err
    assert read_info(left).head == "policy"


@pytest.mark.parametrize("size", ["0GB", "-5GB", "5"])
def test_a_shard_size_that_is_none_is_refused(size, write_hf, into, out_of, tmp_path, capsys):
    assert into(write_hf(), tmp_path / "checkpoint") == 0
    assert out_of(tmp_path / "checkpoint", tmp_path / "out", f"--max-shard-size={size}") == 2
    assert f"--max-shard-size {size}: " in capsys.readouterr().err


def test_a_classifier_that_pads_with_its_tokenizers_end_of_text_is_refused(write_hf, into, tmp_path, capsys):
    source = write_hf(head="reward")
    config = json.loads((source / "config.json").read_text())
    end = AutoTokenizer.from_pretrained(source).eos_token_id
    (source / "config.json").write_text(json.dumps(config | {"pad_token_id": end, "eos_token_id": None}))
    assert into(source, tmp_path / "checkpoint") == 2
    assert f"pad_token_id is {end}, which ends a text" in capsys.readouterr().err


def test_the_working_directory_can_be_written_to(write_hf, into, tmp_path, monkeypatch):
    source, here = write_hf(), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert into(source, ".", "--no-compare") == 0
    assert read_info(here).head == "policy"


def test_a_file_that_cannot_be_read_while_it_is_converted_is_named(write_hf, into, tmp_path, capsys):
    source = write_hf()
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    save_file(tensors, source / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    data = (source / "a.safetensors").read_bytes()
    (source / "a.safetensors").write_bytes(data[:-100])
    assert into(source, tmp_path / "out") == 2
    assert "a.safetensors cannot be read" in capsys.readouterr().err


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
