"""Places to write to that are files, inside a file, devices, read-only, or the input itself."""

from __future__ import annotations

import os

from bad_inputs.case import BadInput, Maker, Site, brain, evaluate, generate


def _sft(*flags: str) -> Maker:
    return lambda site: site.assets.sft_on(str(site.assets.records("sft")), *flags)


def _convert(*flags: str) -> Maker:
    return lambda site: ["convert_hf_to_megatron", "--hf-model", str(site.assets.hf), *flags]


def _export(*flags: str) -> Maker:
    return lambda site: site.assets.export(site.assets.policy, *flags)


def _prepare(*flags: str) -> Maker:
    return lambda site: site.assets.preprocess(str(site.assets.records("sft")), *flags)


def _train_tokenizer(*flags: str) -> Maker:
    return lambda site: site.assets.train_tokenizer(str(site.assets.records("sft")), *flags)


def _plan(*flags: str) -> Maker:
    return lambda site: site.assets.plan(*flags)


def _beside(kind: str, command: Maker) -> Maker:
    """The command, where `x` exists already: as a file, a folder, a folder with a file, a link or a pipe."""

    def make(site):
        path = site.folder / "x"
        if kind == "file":
            path.write_text("somebody's")
        elif kind == "link":
            path.symlink_to("nowhere")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
            if kind == "full folder":
                (path / "a").write_text("somebody's")
        return command(site)

    return make


def _file(command: Maker) -> Maker:
    return _beside("file", command)


def _over_prompts(site: Site) -> list[str]:
    site.write("p.jsonl", site.assets.records("prompts").read_text())
    return generate("--prompts", "p.jsonl", "--output", "p.jsonl")(site)


def _over_input(site: Site) -> list[str]:
    name = site.write("train.json", site.assets.records("sft").read_text())
    return site.assets.preprocess(name, "--output", "train")


def _unverified_file(site: Site) -> list[str]:
    site.write("exported.unverified", "somebody's")
    return site.assets.export(site.assets.policy)


def _converting_the_unverified(site: Site) -> list[str]:
    site.copy(site.assets.hf, "x.unverified")
    return ["convert_hf_to_megatron", "--hf-model", "x.unverified", "--save", "x"]


_LONG = "x" * 300
_IS_FILE = r"/x is a file, and should be a folder"
_PROC = r"/proc cannot be written to"
_FOLDER, _OTHER_FILE = r"give another folder", r"give another file"

CASES = [
    # Runs.
    BadInput("a file to save to", _file(_sft("--save", "x")), r"--save x: " + ".*" + _IS_FILE, _FOLDER),
    BadInput("inside of a file", _file(_sft("--save", "x/y/z")), r"--save x/y/z: .*" + _IS_FILE, _FOLDER),
    BadInput(
        "a link to nothing", _beside("link", _sft("--save", "x")), r"--save x: .*/x is a link to nothing", _FOLDER
    ),
    BadInput("under /proc", _sft("--save", "/proc/x"), r"--save /proc/x: " + _PROC, _FOLDER),
    BadInput("under a device", _sft("--save", "/dev/null/x"), r"--save /dev/null/x: /dev/null is a file", _FOLDER),
    BadInput("a name too long", _sft("--save", _LONG), r"--save x+: .*File name too long", _FOLDER),
    BadInput(
        "a file for the log", _file(_sft("--tensorboard-dir", "x")), r"--tensorboard-dir x: .*" + _IS_FILE, _FOLDER
    ),
    BadInput(
        "the log under /proc", _sft("--tensorboard-dir", "/proc/x"), r"--tensorboard-dir /proc/x: " + _PROC, _FOLDER
    ),
    BadInput("a file for rollouts", _file(brain("--rollout-dir", "x")), r"--rollout-dir x: .*" + _IS_FILE, _FOLDER),
    BadInput("rollouts under /proc", brain("--rollout-dir", "/proc/x"), r"--rollout-dir /proc/x: " + _PROC, _FOLDER),
    BadInput(
        "weights for servers under /proc",
        brain("--engine", "vllm", "--engine-url", "http://127.0.0.1:9", "--engine-sync-dir", "/proc/x"),
        r"--engine-sync-dir /proc/x: " + _PROC,
        _FOLDER,
    ),
    BadInput(
        "a folder for samples",
        _beside("folder", generate("--output", "x")),
        r"--output x: is a folder",
        r"a file in it",
    ),
    BadInput(
        "samples without a name", generate("--output", "x/"), r"--output x/: is a folder", r"name of a file in it"
    ),
    BadInput("samples in a file", _file(generate("--output", "x/y")), r"--output x/y: .*" + _IS_FILE, _OTHER_FILE),
    BadInput("samples under /proc", generate("--output", "/proc/x"), r"--output /proc/x: " + _PROC, _OTHER_FILE),
    BadInput(
        "a pipe for samples",
        _beside("pipe", generate("--output", "x")),
        r"--output x: is a device or a pipe",
        _OTHER_FILE,
    ),
    BadInput("a link for samples", _beside("link", generate("--output", "x")), r"--output x: is a link", _OTHER_FILE),
    BadInput("samples over the prompts", _over_prompts, r"--output p.jsonl: would replace the prompts", _OTHER_FILE),
    BadInput(
        "a folder for a report",
        _beside("folder", evaluate("--output", "x")),
        r"--output x: is a folder",
        r"a file in it",
    ),
    BadInput("a report under /proc", evaluate("--output", "/proc/x"), r"--output /proc/x: " + _PROC, _OTHER_FILE),
    # Tools.
    BadInput("a file to convert to", _file(_convert("--save", "x")), r"--save x: .*" + _IS_FILE, _FOLDER),
    BadInput("converted under /proc", _convert("--save", "/proc/x"), r"--save /proc/x: " + _PROC, _FOLDER),
    BadInput(
        "a full folder to convert to",
        _beside("full folder", _convert("--save", "x")),
        r"--save /.*/x exists and is not empty",
        r"or remove it",
    ),
    BadInput(
        "what is converted in the way", _converting_the_unverified, r"x.unverified would be removed", r"or rename it"
    ),
    BadInput("a file to export to", _file(_export("--save", "x")), r"--save x: .*" + _IS_FILE, _FOLDER),
    BadInput(
        "a full folder to export to",
        _beside("full folder", _export("--save", "x")),
        r"/x exists and is not empty",
        _FOLDER,
    ),
    BadInput("a file in the way of an export", _unverified_file, r"exported.unverified, .* is a file", r"remove it"),
    BadInput("prepared in a file", _file(_prepare("--output", "x/y")), r"--output x/y.bin: .*" + _IS_FILE, _OTHER_FILE),
    BadInput("prepared under /proc", _prepare("--output", "/proc/x"), r"--output /proc/x.bin: " + _PROC, _OTHER_FILE),
    BadInput(
        "prepared without a name", _prepare("--output", "x/"), r"--output x/: is a folder", r"a name, such as x/train"
    ),
    BadInput("prepared into nothing", _prepare("--output", ""), r"--output : is a folder", r"a name, such as train"),
    BadInput("prepared over the records", _over_input, r"train.json would replace the records", r"give another name"),
    BadInput("a file for a tokenizer", _file(_train_tokenizer("--save", "x/y")), r"--save x/y: .*" + _IS_FILE, _FOLDER),
    BadInput(
        "a folder for a tokenizer", _beside("folder", _train_tokenizer("--save", "x")), r"--save x exists", _FOLDER
    ),
    BadInput("a tokenizer under /proc", _train_tokenizer("--save", "/proc/x"), r"--save /proc/x: " + _PROC, _FOLDER),
    BadInput("a plan under /proc", _plan("--json", "/proc/x.json"), r"--json /proc/x.json: " + _PROC, _OTHER_FILE),
    BadInput(
        "a plan in no folder", _plan("--json", "no/x.json"), r"--json no/x.json: its folder is not there", _OTHER_FILE
    ),
]
