"""Hugging Face folders whose config.json or weights are missing, damaged or not supported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_inputs.case import BadInput, Maker, Site

Change = Callable[[Path], object]

_SINGLE, _SHARD, _INDEX = "model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
_FINAL_NORM = "model.norm.weight"


def _convert(site: Site) -> list[str]:
    return ["convert_hf_to_megatron", "--hf-model", "hf", "--save", "converted"]


def _train(site: Site) -> list[str]:
    return site.assets.sft("--train-data", str(site.assets.records("sft")), "--hf-model", "hf", "--save", "saved")


def _copy(change: Change, command: Maker = _convert) -> Maker:
    """Copies the model to `hf`, changes it, and gives it to a command."""

    def make(site):
        change(site.copy(site.assets.hf, "hf"))
        return command(site)

    return make


def _file(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def _config(**changes: object) -> Change:
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _classifier(**changes: object) -> Change:
    one = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    return _config(**{**one, **changes})


def _weights(change: Callable[[dict], object]) -> Change:
    def change_file(folder):
        tensors = load_file(folder / _SINGLE)
        change(tensors)
        save_file(tensors, folder / _SINGLE, {"format": "pt"})

    return change_file


def _index(change: Callable[[dict], object] = lambda files: None, weights: Change = lambda folder: None) -> Change:
    """Makes a file and an index of the weights, and changes the index."""

    def change_files(folder):
        files = dict.fromkeys(load_file(folder / _SINGLE), _SHARD)
        weights(folder)
        (folder / _SINGLE).rename(folder / _SHARD)
        change(files)
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))

    return change_files


def _folder(name: str) -> Change:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


_FETCH = r"fetch (it|them|its files|both) (again|too)"
_NEVER = r"not supported for Llama models, and never ignored"

CASES = [
    # The folder.
    BadInput("no folder", _convert, r"hf is not a directory", r"give the local directory of a Hugging Face model"),
    BadInput("no folder to train from", _train, r"hf is not a directory", r"`hf download NAME"),
    BadInput(
        "an adapter", _copy(_file("adapter_config.json", b"{}")), r"hf has an adapter_config.json", r"merge_and_unload"
    ),
    BadInput(
        "an adapter to train from", _copy(_file("adapter_config.json", b"{}"), _train), r"hf has an adapter", r"Merge"
    ),
    BadInput(
        "generation settings that are no JSON",
        _copy(_file("generation_config.json", b"{")),
        r"generation_config.json is not JSON",
        r"or remove it",
    ),
    BadInput(
        "generation settings that are a folder",
        _copy(_folder("generation_config.json")),
        r"generation_config.json: Is a directory",
        r"remove the folder",
    ),
    # config.json.
    BadInput(
        "no config.json", _copy(lambda p: (p / "config.json").unlink()), r"hf has no config.json", r"fetch the file too"
    ),
    BadInput("not JSON", _copy(_file("config.json", b"{")), r"hf/config.json is not JSON", _FETCH),
    BadInput(
        "not JSON, to train from", _copy(_file("config.json", b"{"), _train), r"hf/config.json is not JSON", _FETCH
    ),
    BadInput(
        "not UTF-8", _copy(_file("config.json", b'{"a": "\xe9"}')), r"hf/config.json is not JSON \('utf-8'", _FETCH
    ),
    BadInput("nested without end", _copy(_file("config.json", b"[" * 100_000)), r"hf/config.json is not JSON", _FETCH),
    BadInput("a list", _copy(_file("config.json", b"[]")), r"hf/config.json holds a list", _FETCH),
    BadInput(
        "not JSON, planned with",
        lambda site: _copy(_file("config.json", b"{"), lambda s: s.assets.plan("--model", "hf"))(site),
        r"hf/config.json is not JSON",
        _FETCH,
    ),
    BadInput(
        "a size in words", _copy(_config(hidden_size="16")), r"hf: config.json has hidden_size='16'", r"of type int"
    ),
    BadInput(
        "a size in words that may be left out",
        _copy(_config(num_key_value_heads="2")),
        r"num_query_groups='2' \(hf\)",
        r"an integer",
    ),
    BadInput(
        "a size that is null",
        _copy(_config(hidden_size=None)),
        r"hf: config.json has no hidden_size",
        r"write it there",
    ),
    BadInput("no layers", _copy(_config(num_hidden_layers=0)), r"num_hidden_layers=0", r"must be positive"),
    BadInput(
        "heads that no group shares",
        _copy(_config(num_attention_heads=3)),
        r"hf: num_attention_heads=3",
        r"multiple of num_query_groups=2",
    ),
    BadInput(
        "more layers than weights",
        _copy(_config(num_hidden_layers=3)),
        r"hf lacks 9 of the 29 tensors",
        r"or correct config.json",
    ),
    BadInput(
        "an unknown architecture",
        _copy(_config(architectures=["FooForCausalLM"])),
        r"config.json: architectures=\['FooForCausalLM'\]",
        r"supported are .*LlamaForCausalLM",
    ),
    BadInput(
        "a known one that is not supported",
        _copy(_config(architectures=["Gemma2ForCausalLM"])),
        r"Gemma 2 \(Gemma2ForCausalLM\)",
        r"our network has no",
    ),
    BadInput(
        "another type",
        _copy(_config(model_type="qwen2")),
        r"config.json: .*model_type='qwen2'",
        r"correct the one that is wrong",
    ),
    BadInput(
        "quantised weights",
        _copy(_config(quantization_config={"quant_method": "gptq"})),
        r"quantization_config",
        _NEVER,
    ),
    BadInput("another activation", _copy(_config(hidden_act="relu")), r"hidden_act='relu'", _NEVER),
    BadInput(
        "scaled positions",
        _copy(_config(rope_scaling={"rope_type": "yarn", "factor": 2.0})),
        r"rope_type='yarn'",
        _NEVER,
    ),
    BadInput(
        "positions that are no object", _copy(_config(rope_scaling=[1])), r"\[1\] as rope_scaling", r"must be an object"
    ),
    BadInput(
        "two labels", _copy(_classifier(id2label={"0": "a", "1": "b"})), r"the classifier has 2 labels", r"num_labels=1"
    ),
    BadInput(
        "padding that ends a text",
        _copy(_classifier(pad_token_id=4)),
        r"pad_token_id is 4, which ends a text",
        r"another id",
    ),
    BadInput(
        "a classifier to train from", _copy(_classifier(), _train), r"hf is a reward model", r"give a LlamaForCausalLM"
    ),
    # Weights.
    BadInput("no weights", _copy(lambda p: (p / _SINGLE).unlink()), r"hf has no model.safetensors", r"save_pretrained"),
    BadInput(
        "a pointer of git-lfs",
        _copy(_file(_SINGLE, _POINTER)),
        r"hf/model.safetensors is a pointer of git-lfs",
        r"git lfs pull",
    ),
    BadInput(
        "a pointer to train from", _copy(_file(_SINGLE, _POINTER), _train), r"is a pointer of git-lfs", r"git lfs pull"
    ),
    BadInput(
        "cut weights",
        _copy(lambda p: (p / _SINGLE).write_bytes((p / _SINGLE).read_bytes()[:-50])),
        r"hf/model.safetensors cannot be read",
        _FETCH,
    ),
    BadInput("an empty file", _copy(_file(_SINGLE, b"")), r"hf/model.safetensors cannot be read", _FETCH),
    BadInput(
        "a tensor too few",
        _copy(_weights(lambda t: t.pop(_FINAL_NORM))),
        r"hf lacks 1 of the 20 tensors .* model.norm.weight",
        _FETCH,
    ),
    BadInput(
        "a tensor too many",
        _copy(_weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}))),
        r"does not have: model.layers.0.self_attn.q_proj.bias",
        _FETCH,
    ),
    BadInput(
        "another shape",
        _copy(_weights(lambda t: t.update({_FINAL_NORM: torch.zeros(17)}))),
        r"model.norm.weight has shape \[17\]",
        r"ask for \[16\]: correct",
    ),
    BadInput(
        "another shape to train from",
        _copy(_weights(lambda t: t.update({_FINAL_NORM: torch.zeros(17)})), _train),
        r"model.norm.weight has shape \[17\]",
        r"ask for \[16\]",
    ),
    BadInput(
        "whole numbers",
        _copy(_weights(lambda t: t.update({_FINAL_NORM: torch.zeros(16, dtype=torch.int8)}))),
        r"model.norm.weight is I8",
        r"the model that is not quantised",
    ),
    BadInput(
        "8 bits",
        _copy(_weights(lambda t: t.update({_FINAL_NORM: torch.zeros(16).to(torch.float8_e4m3fn)}))),
        r"model.norm.weight is F8_E4M3",
        r"not quantised",
    ),
    BadInput(
        "a tied output that differs",
        _copy(_weights(lambda t: t.update({"lm_head.weight": torch.zeros(330, 16)}))),
        r"lm_head.weight differs from model.embed_tokens.weight",
        r"set tie_word_embeddings to false",
    ),
    BadInput(
        "weights that are no numbers",
        _copy(_weights(lambda t: t[_FINAL_NORM].fill_(float("nan")))),
        r"the logits are not finite: .*the final norm",
        r"fetch them again",
        status=1,
        leaves=["converted.unverified*"],
    ),
    # The index of several files.
    BadInput(
        "a file that is not there",
        _copy(_index(lambda files: files.update({_FINAL_NORM: "model-2.safetensors"}))),
        r"names files that are not there: model-2.safetensors",
        _FETCH,
    ),
    BadInput(
        "a tensor that no file has",
        _copy(_index(weights=_weights(lambda t: t.pop(_FINAL_NORM)))),
        r"00001.safetensors has no model.norm.weight",
        _FETCH,
    ),
    BadInput(
        "a tensor that no model has",
        _copy(_index(lambda files: files.update({"model.foo": _SHARD}))),
        r"does not have: model.foo",
        _FETCH,
    ),
    BadInput(
        "a file of another folder",
        _copy(_index(lambda files: files.update({_FINAL_NORM: "../x"}))),
        r"index.json names ../x",
        _FETCH,
    ),
    BadInput(
        "an index that is no JSON",
        _copy(lambda p: (_index()(p), _file(_INDEX, b"{")(p))),
        r"index.json is not the index",
        _FETCH,
    ),
    BadInput(
        "an index without a map",
        _copy(lambda p: (_index()(p), _file(_INDEX, b"{}")(p))),
        r"index.json is not the index .*weight_map",
        _FETCH,
    ),
]
