"""Checkpoints that are missing, damaged, cut off or of another format, for every command that reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from bad_inputs.case import UNFINISHED_RUN, BadInput, Maker, Site

Change = Callable[[Path], object]
"""A change of a folder iter_NNNNNNN."""

_INFO, _INDEX, _WEIGHTS, _RECORDS = "megatron_brain.json", "tensors.json", "weights_*", "records/replica_00000.jsonl"


def _resume(site: Site) -> list[str]:
    data = str(site.assets.records("sft"))
    return site.assets.sft("--train-data", data, "--load", "ck", "--train-iters", "3", "--save", "saved")


def _finetune(site: Site) -> list[str]:
    data = str(site.assets.records("sft"))
    return site.assets.sft("--train-data", data, "--load", "ck", "--finetune", "--save", "saved", "--no-verify")


def _again(*flags: str) -> Maker:
    return lambda site: site.assets.brain_again("ck", *flags)


def _export(site: Site) -> list[str]:
    return site.assets.export("ck")


def _inspect(site: Site) -> list[str]:
    return ["inspect_checkpoint", "ck"]


def _copy(change: Change, command: Maker = _resume, of: str = "policy") -> Maker:
    """Copies a --save folder to `ck`, changes its latest checkpoint, and gives it to a command."""

    def make(site):
        folder = site.copy(getattr(site.assets, of), "ck")
        change(sorted(folder.glob("iter_*"))[-1])
        return command(site)

    return make


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Change:
    def change_file(folder):
        [path] = folder.glob(name)
        path.write_bytes(change(path.read_bytes()))

    return change_file


def _flip(name: str, place: int) -> Change:
    def flip(content):
        changed = bytearray(content)
        changed[place] ^= 0x10
        return bytes(changed)

    return _bytes(name, flip)


def _flip_values(content: bytes) -> bytes:
    """Flips a bit of the embedding, which every command reads."""
    header = int.from_bytes(content[:8], "little")
    [place] = [
        tensor["data_offsets"][0]
        for name, tensor in json.loads(content[8 : 8 + header]).items()
        if name.startswith("embedding.word_embeddings.weight@")
    ]
    changed = bytearray(content)
    changed[8 + header + place] ^= 0x10
    return bytes(changed)


def _cut(name: str) -> Change:
    return _bytes(name, lambda content: content[:-100])


def _remove(name: str) -> Change:
    def remove(folder):
        [path] = folder.glob(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _json(name: str, change: Callable[[dict], object]) -> Change:
    """Edits a JSON file and removes its checksum, like a user who edits it on purpose."""

    def edit(folder):
        values = json.loads((folder / name).read_text())
        values.pop("checksum", None)
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def _latest(content: bytes) -> Change:
    return lambda folder: (folder.parent / "latest_checkpointed_iteration.txt").write_bytes(content)


def _file(site):
    site.write("ck", "x")
    return _resume(site)


def _hugging_face(site):
    site.copy(site.assets.hf, "ck")
    return _finetune(site)


_COPY = r"Copy it again from where it was saved"

CASES = [
    # Not a checkpoint.
    BadInput("no folder", _resume, r"checkpoint folder /.*/ck does not exist", r"give .*--save folder"),
    BadInput("a file", _file, r"checkpoint folder /.*/ck is a file", r"give .*--save folder"),
    BadInput(
        "an empty folder",
        _copy(lambda p: shutil.rmtree(p.parent) or p.parent.mkdir()),
        r"/ck holds no checkpoint",
        r"--save of the earlier run",
    ),
    BadInput(
        "a Hugging Face folder", _hugging_face, r"/ck holds no checkpoint", r"is given as --hf-model, or converted"
    ),
    BadInput(
        "a latest one in words", _copy(_latest(b"release")), r"iteration.txt says 'release'", r"write the number of one"
    ),
    BadInput(
        "a latest one in powers", _copy(_latest("\xb2".encode())), r"iteration.txt says '\xb2'", r"write the number"
    ),
    BadInput(
        "a latest one that is gone", _copy(_latest(b"9")), r"says 9, but iter_0000009 is not there", r"found: 1, 2"
    ),
    # megatron_brain.json.
    BadInput("no description", _copy(_remove(_INFO)), r"ck/iter_0000002 has no megatron_brain.json", _COPY),
    BadInput("a cut description", _copy(_cut(_INFO)), r"megatron_brain.json is not JSON", _COPY),
    BadInput(
        "a description that is not UTF-8",
        _copy(_bytes(_INFO, lambda _: b'"\xe9"')),
        r"brain.json is not JSON: 'utf-8'",
        _COPY,
    ),
    BadInput(
        "a description nested without end",
        _copy(_bytes(_INFO, lambda _: b"[" * 100_000)),
        r"brain.json is not JSON",
        _COPY,
    ),
    BadInput(
        "a flipped bit in the description",
        _copy(_bytes(_INFO, lambda content: content.replace(b'"iteration": 2', b'"iteration": 3'))),
        r"megatron_brain.json is damaged: it is not what was written, by its checksum",
        _COPY + r".*remove its 'checksum'",
    ),
    BadInput("another format", _copy(_json(_INFO, lambda v: v.update(format=2))), r"checkpoint format 2", r"reads 4"),
    BadInput(
        "a format in words",
        _copy(_json(_INFO, lambda v: v.update(format="4"))),
        r"checkpoint format '4'",
        r"the version that wrote it",
    ),
    BadInput("no head", _copy(_json(_INFO, lambda v: v.pop("head"))), r"is damaged: it differs in head", _COPY),
    BadInput("an unknown head", _copy(_json(_INFO, lambda v: v.update(head="value"))), r"its head is 'value'", _COPY),
    BadInput(
        "an unknown size",
        _copy(_json(_INFO, lambda v: v["architecture"].update(depth=1))),
        r"iter_0000002 has depth",
        r"this version .* does not know",
    ),
    BadInput(
        "a size in words",
        _copy(_json(_INFO, lambda v: v["architecture"].update(num_layers="2"))),
        r"num_layers='2' \(ck",
        r"expected an integer",
    ),
    BadInput(
        "a size below 0",
        _copy(_json(_INFO, lambda v: v["architecture"].update(num_layers=-2))),
        r"ck/iter_0000002: num_layers=-2",
        r"must be positive",
    ),
    BadInput(
        "more layers",
        _copy(_json(_INFO, lambda v: v["architecture"].update(num_layers=4))),
        r"has no decoder.layers.2",
        _COPY,
    ),
    BadInput(
        "another width",
        _copy(_json(_INFO, lambda v: v["architecture"].update(hidden_size=32))),
        r"weight has shape \(330, 16\)",
        r"needed is",
    ),
    BadInput(
        "no position",
        _copy(_json(_INFO, lambda v: v.update(trainer_state={}))),
        r"brain.json is damaged: its trainer_state lacks",
        _COPY,
    ),
    # tensors.json.
    BadInput(
        "no list of tensors", _copy(_remove(_INDEX)), r"ck/iter_0000002 is damaged: tensors.json is missing", _COPY
    ),
    BadInput(
        "a flipped bit in the list", _copy(_flip(_INDEX, 200)), r"damaged: tensors.json is not what was saved", _COPY
    ),
    BadInput(
        "a cut list, not verified",
        _copy(_cut(_INDEX), _finetune),
        r"tensors.json: the checkpoint is damaged",
        _COPY,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "a list of another kind",
        _copy(_bytes(_INDEX, lambda _: b"[]"), _finetune),
        r"tensors.json: .* damaged",
        _COPY,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "a tensor that is not listed",
        _copy(_json(_INDEX, lambda v: v["tensors"].pop("decoder.final_layernorm.weight")), _finetune),
        r"iter_0000002 has no decoder.final_layernorm.weight",
        _COPY,
        leaves=UNFINISHED_RUN,
    ),
    # Weights.
    BadInput(
        "no weights", _copy(_remove(_WEIGHTS)), r"weights_00000.safetensors is not there", _COPY, leaves=UNFINISHED_RUN
    ),
    BadInput(
        "cut weights",
        _copy(_cut(_WEIGHTS)),
        r"weights_00000.safetensors has \d+ bytes, written were",
        _COPY,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "a flipped bit in the weights",
        _copy(_flip(_WEIGHTS, -50)),
        r"ck/iter_0000002: damaged: \S+@\S+ in weights_00000.safetensors: the values",
        _COPY + r".*--no-verify",
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "a flipped bit in the weights, as a process",
        _copy(_flip(_WEIGHTS, -50)),
        r"ck/iter_0000002: damaged: \S+@\S+ in weights_00000.safetensors: the values",
        _COPY,
        leaves=UNFINISHED_RUN,
        as_process=True,
    ),
    BadInput(
        "a flipped bit in the head",
        _copy(_flip(_WEIGHTS, 20)),
        r"weights_00000.safetensors is damaged: ",
        _COPY,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "a flipped bit in its length",
        _copy(_flip(_WEIGHTS, 7)),
        r"weights_00000.safetensors is damaged: ",
        _COPY,
        leaves=UNFINISHED_RUN,
    ),
    BadInput(
        "a flipped bit where a requeued run resumes",
        _copy(
            _flip(_WEIGHTS, -50),
            lambda s: s.assets.sft(
                "--train-data",
                str(s.assets.records("sft")),
                "--hf-model",
                str(s.assets.hf),
                "--save",
                "ck",
                "--auto-resume",
                "--train-iters",
                "3",
            ),
        ),
        r"ck/iter_0000002: damaged: \S+ in weights_00000",
        r"load an earlier checkpoint \(--load DIR/iter_NNNNNNN\)",
    ),
    BadInput(
        "cut weights, exported", _copy(_cut(_WEIGHTS), _export), r"weights_00000.safetensors has \d+ bytes", _COPY
    ),
    BadInput(
        "a flipped bit, exported",
        _copy(_bytes(_WEIGHTS, _flip_values), _export),
        r"ck/iter_0000002: damaged: \S+@\S+ in weights_00000.safetensors",
        _COPY,
        leaves=["exported.unverified*"],
    ),
    # Other files.
    BadInput("no configuration", _copy(_remove("config.yaml")), r"damaged: config.yaml is missing", _COPY),
    BadInput("no tokenizer", _copy(_remove("tokenizer")), r"damaged: tokenizer/\S+ is missing", _COPY),
    BadInput(
        "a flipped bit in the rollouts",
        _copy(_flip(_RECORDS, 50), _again(), "brain"),
        r"damaged: records/replica_00000.jsonl",
        _COPY,
    ),
    BadInput(
        "cut rollouts, not verified",
        _copy(_cut(_RECORDS), _again("--no-verify"), "brain"),
        r"replica_00000.jsonl:\d is damaged",
        _COPY,
        leaves=UNFINISHED_RUN,
    ),
    # inspect_checkpoint.py.
    BadInput("no folder to look at", _inspect, r"checkpoint folder /.*/ck does not exist", r"give .*--save folder"),
    BadInput(
        "a flipped bit, looked at",
        _copy(_flip(_WEIGHTS, -50), _inspect),
        r"\S+@\S+ in weights_00000.safetensors: not what was saved",
        r"DAMAGED",
        status=1,
        on_stdout=True,
    ),
    BadInput(
        "a flipped head, looked at",
        _copy(_flip(_WEIGHTS, 20), _inspect),
        r"weights_00000.safetensors is damaged",
        _COPY,
        status=1,
    ),
    BadInput(
        "a cut list, looked at",
        _copy(_cut(_INDEX), _inspect),
        r"tensors.json: the checkpoint is damaged",
        _COPY,
        status=1,
    ),
    BadInput(
        "a flipped description, looked at",
        _copy(_flip(_INFO, 30), _inspect),
        r"megatron_brain.json is not JSON",
        _COPY,
        status=1,
    ),
    BadInput(
        "no position, looked at",
        _copy(_json(_INFO, lambda v: v.update(trainer_state={"scheduler": 3})), _inspect),
        r"brain.json is damaged: what it says of its run",
        _COPY,
        status=1,
    ),
]
