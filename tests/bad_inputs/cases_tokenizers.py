"""Tokenizers that are missing, cut off, contradictory or unfit for the model; and corpora for a new one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from helpers.tiny_tokenizers import train_sentencepiece

from bad_inputs.case import BadInput, Maker


def _named(place: str, *flags: str) -> Maker:
    return lambda site: site.assets.sft_from_sizes(place, *flags)


def _changed(change: Callable[[Path], object]) -> Maker:
    """Changes a copy of the tokenizer in `tok` and trains with it."""

    def make(site):
        change(site.copy(site.assets.tokenizer, "tok"))
        return site.assets.sft_from_sizes("tok")

    return make


def _settings(**changes: object) -> Callable[[Path], object]:
    def change(folder):
        path = folder / "tokenizer_config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))

    return change


def _rules(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def change_file(folder):
        path = folder / "tokenizer.json"
        rules = json.loads(path.read_text())
        change(rules)
        path.write_text(json.dumps(rules))

    return change_file


def _file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def _sentencepiece(change: Callable[[bytes], bytes], *flags: str, **settings: int) -> Maker:
    def make(site):
        path = Path(train_sentencepiece(site.folder, **settings))
        site.write("t.model", change(path.read_bytes()))
        return site.assets.sft_from_sizes(
            "t.model", "--tokenizer-type", "SentencePieceTokenizer", *flags, vocab_size=400
        )

    return make


def _template_number(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    _settings(chat_template=3)(folder)


def _empty_folder(site):
    (site.folder / "tok").mkdir()
    return site.assets.sft_from_sizes("tok")


def _without_tokenizer(site):
    for path in site.copy(site.assets.hf, "hf").glob("*token*"):
        path.unlink()
    return site.assets.sft("--train-data", str(site.assets.records("sft")), "--hf-model", "hf")


def _train(data: str | None, *flags: str, content: str | bytes = "") -> Maker:
    """Trains a tokenizer on the records of sft, or on a file."""

    def make(site):
        if data is None:
            return site.assets.train_tokenizer(str(site.assets.records("sft")), *flags)
        return site.assets.train_tokenizer(site.write(data, content), *flags)

    return make


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
_REPAIR = r"give a directory with tokenizer.json and tokenizer_config.json"
_COPY = r"copy the files of the model's tokenizer there"

CASES = [
    # Nothing to read.
    BadInput(
        "no folder", _named("no/such/folder"), r"--tokenizer-model no/such/folder: no such folder", r"looked for /"
    ),
    BadInput(
        "a hub name that is none", _named("nothing"), r"--tokenizer-model nothing: .*cannot read", r"hub name that can"
    ),
    BadInput("an empty folder", _empty_folder, r"--tokenizer-model tok: there is no tokenizer in it", _COPY),
    BadInput("no vocabulary", _changed(lambda p: (p / "tokenizer.json").unlink()), r"model tok: .*no tokenizer", _COPY),
    BadInput("a model without one", _without_tokenizer, r"--tokenizer-model hf: there is no tokenizer in it", _COPY),
    BadInput(
        "none for the tool",
        lambda site: ["check_data", "--stage", "sft", "--input", str(site.assets.records("sft"))],
        r"no tokenizer",
        r"give --tokenizer-model, or --load or --hf-model",
    ),
    # tokenizer.json and tokenizer_config.json.
    BadInput("no end of text", _changed(_settings(eos_token=None)), r"model tok: no EOS token", r"set eos_token in"),
    BadInput("an end that is a number", _changed(_settings(eos_token=3)), r"model tok: .*eos_token", _REPAIR),
    BadInput(
        "no settings", _changed(lambda p: (p / "tokenizer_config.json").unlink()), r"tok: no EOS", r"set eos_token"
    ),
    BadInput(
        "settings that are no JSON", _changed(_file("tokenizer_config.json", b"{")), r"model tok: .*JSON", _REPAIR
    ),
    BadInput(
        "settings that are not UTF-8", _changed(_file("tokenizer_config.json", b'{"a": "\xe9"}')), r"utf-8", _REPAIR
    ),
    BadInput(
        "a cut vocabulary", _changed(lambda p: _cut(p / "tokenizer.json")), r"model tok: .*JSONDecodeError", _REPAIR
    ),
    BadInput("a pointer of git-lfs", _changed(_file("tokenizer.json", _POINTER)), r"model tok: .*cannot read", _REPAIR),
    BadInput("no rules", _changed(_rules(lambda rules: rules.pop("model"))), r"model tok: .*[Mm]odel missing", _REPAIR),
    BadInput(
        "merges of unknown pieces",
        _changed(_rules(lambda rules: rules["model"].update(merges=[["zz", "qq"]]))),
        r"model tok: .*`zz` out of vocabulary",
        _REPAIR,
    ),
    BadInput(
        "rules that cannot write a digit",
        _changed(_rules(lambda r: r.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}))),
        r"--tokenizer-model tok: its tokenizer.json cannot encode '0'",
        r"unknown token or byte fallback",
    ),
    BadInput(
        "a length that is a text",
        _changed(_settings(model_max_length="long")),
        r"tok: AutoTokenizer .* cannot encode",
        r"repair tokenizer_config.json",
    ),
    BadInput(
        "a class that adds tokens",
        _changed(_settings(tokenizer_class="GPT2Tokenizer")),
        r"model tok: bos_token '<\|endoftext\|>' is not in its tokenizer.json",
        r"set bos_token in tokenizer_config.json",
    ),
    BadInput(
        "code of its own",
        _changed(_settings(auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="Y")),
        r"custom code",
        _REPAIR,
    ),
    BadInput(
        "a template that is a number",
        _changed(_template_number),
        r"chat template 'default' is 3",
        r"--chat-template FILE",
    ),
    BadInput(
        "more ids than the model has",
        lambda site: site.assets.sft_from_sizes(str(site.assets.tokenizer), vocab_size=100),
        r"needs a vocabulary of 330 ids and the model has 100",
        r"or resize the model's embeddings",
    ),
    # SentencePiece.
    BadInput(
        "no model file",
        _named("no.model", "--tokenizer-type", "SentencePieceTokenizer"),
        r"no.model: no file /",
        r"\.model file",
    ),
    BadInput(
        "a model that is text",
        _sentencepiece(lambda _: b"hello"),
        r"t.model: not a SentencePiece model",
        r"copy .* again",
    ),
    BadInput(
        "a cut model",
        _sentencepiece(lambda content: content[:2000]),
        r"t.model: not a SentencePiece model",
        r"copy .* again",
    ),
    BadInput("a model without an end", _sentencepiece(lambda c: c, eos_id=-1), r"t.model: no EOS piece", r"--eos_id"),
    BadInput(
        "chats without a template",
        lambda site: _sentencepiece(lambda c: c, "--train-data", str(site.assets.records("chats")))(site),
        r"chats.jsonl:1: SentencePieceTokenizer has no chat template",
        r"give --chat-template FILE, use a HuggingFaceTokenizer",
    ),
    # A new tokenizer.
    BadInput("no corpus", lambda site: site.assets.train_tokenizer("no.txt"), r"no.txt: no such file", r"looked for /"),
    BadInput("an empty corpus", _train("a.txt"), r"a.txt: no text in it", r"give files with some"),
    BadInput(
        "a corpus in Latin-1", _train("a.txt", content=b"a\ncaf\xe9\n"), r"a.txt:2: not UTF-8", r"convert the file"
    ),
    BadInput(
        "records without text", _train("a.jsonl", content='{"q": "a"}\n'), r"a.jsonl:1: no text", r"needs one of text"
    ),
    BadInput(
        "a text that is a number",
        _train("a.jsonl", content='{"text": 1}\n'),
        r"a.jsonl:1: field 'text'",
        r"must be a text",
    ),
    BadInput("no pieces", _train(None, "--vocab-size", "0"), r"--vocab-size 0", r"must be above 260"),
    BadInput("too few pieces", _train(None, "--vocab-size", "300"), r"--vocab-size 300", r"must be above 355"),
    BadInput(
        "too many pieces", _train(None, "--vocab-size", "50000"), r"--vocab-size 50000: .* 4\d\d pieces", r"lower it"
    ),
    BadInput("half of the characters", _train(None, "--character-coverage", "0.5"), r"coverage 0.5", r"at least 0.98"),
    BadInput("a symbol twice", _train(None, "--user-defined-symbols", "<x>", "<x>"), r"symbols <x>", r"leave one out"),
    BadInput(
        "a symbol with a space", _train(None, "--user-defined-symbols", "a b"), r"symbols 'a b'", r"must not .* white"
    ),
]
