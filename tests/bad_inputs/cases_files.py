"""Files, globs and saved data sets that cannot be read, or whose lines and rows are not records."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from bad_inputs.case import BadInput, Maker

RECORD = {"prompt": "a tool", "completion": " small"}
LINE = json.dumps(RECORD) + "\n"
_NOT_TEXT = pyarrow.StringArray.from_buffers(
    2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xff\xfe")
)


def _file(name: str, content: str | bytes) -> Maker:
    return lambda site: site.assets.sft_on(site.write(name, content))


def _checked(name: str, content: str | bytes) -> Maker:
    return lambda site: site.assets.check(site.write(name, content))


def _prepared(name: str, content: str | bytes) -> Maker:
    return lambda site: site.assets.preprocess(site.write(name, content))


def _parquet(columns: dict, change: Callable[[bytes], bytes] = lambda content: content) -> Maker:
    def make(site):
        path = site.folder / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        path.write_bytes(change(path.read_bytes()))
        return site.assets.sft_on(path.name)

    return make


def _arrow(change: Callable[[bytes], bytes]) -> Maker:
    def make(site):
        path, table = site.folder / "data.arrow", pyarrow.table({name: [text] * 20 for name, text in RECORD.items()})
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        path.write_bytes(change(path.read_bytes()))
        return site.assets.sft_on(path.name)

    return make


def _contradicting(site):
    lengths, text = (pyarrow.py_buffer(content) for content in (b"\0\0\0\0\xff\xff\xff\x0f\3\0\0\0", b"abc"))
    prompt = pyarrow.StringArray.from_buffers(2, lengths, text)
    table = pyarrow.table({"prompt": prompt, "completion": [" b", " c"]})
    with pyarrow.ipc.new_file(str(site.folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    return site.assets.sft_on("data.arrow")


def _saved(data: datasets.Dataset | datasets.DatasetDict, change: Callable[[Path], object]) -> Maker:
    def make(site):
        data.save_to_disk(site.folder / "data")
        change(site.folder / "data")
        return site.assets.sft_on("data")

    return make


def _rows(*records: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(records))


def _truncate(pattern: str) -> Callable[[Path], Sequence]:
    return lambda folder: [path.write_bytes(path.read_bytes()[:100]) for path in folder.glob(pattern)]


def _folder_in_glob(site):
    site.write("d/a.jsonl", LINE)
    (site.folder / "d" / "b.jsonl").mkdir()
    return site.assets.sft_on("d/*.jsonl")


def _empty_in_glob(site):
    site.write("d/a.jsonl", LINE)
    site.write("d/b.jsonl", "")
    return site.assets.sft_on("d/*.jsonl")


def _plain_folder(site):
    site.write("data/a.jsonl", LINE)
    return site.assets.sft_on("data")


CASES = [
    # Missing or empty.
    BadInput("no file", lambda site: site.assets.sft_on("no.jsonl"), r"no.jsonl: no such file", r"looked for /"),
    BadInput("a glob of nothing", lambda site: site.assets.sft_on("no/*.jsonl"), r"no/\*.jsonl", r"one that is there"),
    BadInput(
        "a hub name that is none",
        lambda site: site.assets.sft_on("nobody/nothing"),
        r"nobody/nothing: no such file \(looked for /",
        r"not a data set that can be loaded from the hub",
    ),
    BadInput("a folder of files", _plain_folder, r"data: a folder that", r"give a glob such as data/\*.jsonl"),
    BadInput("a folder among files", _folder_in_glob, r"d/b.jsonl: cannot be read", r"copy it here again"),
    BadInput("an empty file", _file("data.jsonl", ""), r"data.jsonl: the file is empty", r"write records into it"),
    BadInput("an empty file among others", _empty_in_glob, r"d/b.jsonl: the file is empty", r"leave it out"),
    BadInput("an empty array", _file("data.json", "[]"), r"data.json: the file is empty", r"write records into it"),
    BadInput(
        "no validation data",
        lambda site: site.assets.sft_on(str(site.assets.records("sft")), "--valid-data", "no.jsonl"),
        r"no.jsonl: no such file",
        r"one that is there",
    ),
    BadInput("another kind of file", _file("data.csv", "a,b\n"), r"data.csv: unknown kind", r"one of .jsonl, .json"),
    # Text that is not UTF-8.
    BadInput(
        "Latin-1",
        _file("data.jsonl", LINE.encode() + '{"prompt": "caf\xe9"}\n'.encode("latin1")),
        r"data.jsonl:2: not UTF-8 text \(invalid continuation byte at byte 15\)",
        r"write the file as UTF-8",
    ),
    BadInput("UTF-16", _file("data.jsonl", LINE.encode("utf-16")), r"data.jsonl:1: not UTF-8", r"write .* as UTF-8"),
    BadInput(
        "a surrogate as bytes",
        _file("data.jsonl", b'{"prompt": "a\xed\xa0\xbd", "completion": " b"}\n'),
        r"data.jsonl:1: not UTF-8 text",
        r"an emoji is one character and not two surrogates",
    ),
    BadInput(
        "a surrogate as an escape",
        _file("data.jsonl", LINE + '{"prompt": "a\\ud83d", "completion": " b"}\n'),
        r"data.jsonl:2: '\\ud83d' is half of a character",
        r"write the file as UTF-8",
    ),
    BadInput(
        "a surrogate in an array",
        _file("data.json", f'[{LINE}, {{"prompt": "a", "completion": "\\ude00"}}]'),
        r"data.json\[1\]: '\\ude00' is half of a character",
        r"write the file as UTF-8",
    ),
    # Text that is not JSON.
    BadInput(
        "a cut line", _file("data.jsonl", LINE + LINE[:20]), r"data.jsonl:2: not valid JSON", r"one object a line"
    ),
    BadInput(
        "two on a line", _file("data.jsonl", LINE.strip() * 2), r"data.jsonl:1: .*Extra data", r"one object a line"
    ),
    BadInput(
        "an object over several lines",
        _file("data.json", json.dumps(RECORD, indent=2)),
        r"data.json:1: not valid JSON",
        r"one object a line, or an array",
    ),
    BadInput("a cut array", _file("data.json", f"[{LINE}"), r"data.json: not valid JSON", r"an array of them"),
    BadInput(
        "JSON nested without end",
        _file("data.jsonl", '{"prompt": ' + "[" * 100_000 + "\n"),
        r"data.jsonl:1: not valid JSON",
        r"one object a line",
    ),
    BadInput(
        "a list on a line", _file("data.jsonl", "[1, 2]\n"), r"data.jsonl:1", r"must be a JSON object .* not list"
    ),
    BadInput("zeros", _file("data.jsonl", bytes(50)), r"data.jsonl:1: not valid JSON", r"one object a line"),
    # Compressed files.
    BadInput(
        "not compressed", _file("data.jsonl.gz", LINE), r"data.jsonl.gz: cannot be read", r"the ending of its kind"
    ),
    BadInput(
        "a cut gzip file",
        _file("data.jsonl.gz", gzip.compress(LINE.encode() * 200)[:-20]),
        r"data.jsonl.gz: cannot be read",
        r"copy it here again",
    ),
    BadInput(
        "a cut zstd file",
        _file("data.jsonl.zst", pyarrow.compress(LINE.encode() * 200, codec="zstd", asbytes=True)[:-10]),
        r"data.jsonl.zst: cannot be read",
        r"copy it here again",
    ),
    BadInput("another compression", _file("data.jsonl.bz2", b"x"), r"data.jsonl.bz2: unknown kind", r".jsonl.gz"),
    # Tables.
    BadInput(
        "lines called parquet", _file("data.parquet", LINE), r"data.parquet: cannot be read", r"ending of its kind"
    ),
    BadInput(
        "a cut parquet file",
        _parquet({name: [text] for name, text in RECORD.items()}, lambda content: content[:-20]),
        r"data.parquet: cannot be read as parquet",
        r"copy it here again",
    ),
    BadInput(
        "other columns",
        _parquet({"question": ["a"], "answer": ["b"]}),
        r"data.parquet\[0\]: field 'completion' is missing; the record has question, answer",
        r"rename the one that it is in",
    ),
    BadInput(
        "a null in a row",
        _parquet({"prompt": ["a", None], "completion": [" b", " c"]}),
        r"data.parquet\[1\]: field 'prompt' is missing",
        r"remove the record",
    ),
    BadInput(
        "a row that is no text",
        _parquet({"prompt": _NOT_TEXT, "completion": [" b", " c"]}),
        r"data.parquet\[1\]: field 'prompt' is not UTF-8",
        r"write the table anew",
    ),
    BadInput(
        "a map with a key twice",
        _parquet(
            {
                **{k: [v] for k, v in RECORD.items()},
                "m": pyarrow.array([[("k", 1), ("k", 2)]], pyarrow.map_("string", "int64")),
            }
        ),
        r"data.parquet\[0\]: field 'm' has a key twice",
        r"write the table anew",
    ),
    BadInput(
        "a cut arrow file", _arrow(lambda content: content[:-40]), r"data.arrow: cannot be read", r"copy it .* again"
    ),
    BadInput(
        "lengths that contradict", _contradicting, r"data.arrow: damaged in its column 'prompt'", r"copy it .* again"
    ),
    BadInput(
        "lines called arrow", _arrow(lambda _: LINE.encode()), r"data.arrow: cannot be read", r"ending of its kind"
    ),
    # Saved data sets.
    BadInput(
        "a split that is not there",
        _saved(datasets.DatasetDict({"test": _rows(RECORD)}), lambda folder: None),
        r"data: no split 'train'",
        r"it has test",
    ),
    BadInput(
        "a cut part of one", _saved(_rows(RECORD), _truncate("*.arrow")), r"data: a folder .* damaged", r"write it anew"
    ),
    BadInput(
        "a cut list of its parts", _saved(_rows(RECORD), _truncate("state.json")), r"data: a folder", r"write it anew"
    ),
    BadInput(
        "a list of parts that is none",
        _saved(_rows(RECORD), lambda folder: (folder / "state.json").write_text("[]")),
        r"data: a folder that datasets.save_to_disk did not write, or that is damaged",
        r"write it anew",
    ),
    BadInput(
        "one that is empty",
        _saved(datasets.Dataset.from_dict({"prompt": [], "completion": []}), lambda folder: None),
        r"data: a folder .* empty",
        r"write it anew",
    ),
    # Tools.
    BadInput(
        "no file to check", lambda site: site.assets.check("no.jsonl"), r"no.jsonl: no such file", r"that is there"
    ),
    BadInput(
        "a file of several mistakes, checked",
        _checked("data.jsonl", LINE + '{"prompt": "a"}\n{oops\n[1]\n'),
        r"data.jsonl:2: field 'completion' is missing(.|\n)*data.jsonl:3: not valid JSON(.|\n)*data.jsonl:4: must be",
        r"3 errors, 0 warnings",
        status=1,
        on_stdout=True,
    ),
    BadInput(
        "a cut gzip file, checked",
        _checked("data.jsonl.gz", gzip.compress(LINE.encode() * 200)[:-20]),
        r"error: unreadable source: 1\n  data.jsonl.gz: cannot be read",
        r"copy it here again",
        status=1,
        on_stdout=True,
    ),
    BadInput(
        "a file without records, prepared",
        _prepared("data.jsonl", "\n\n"),
        r"data.jsonl: the file is empty",
        r"write records into it",
        leaves=["prepared.parts*"],
    ),
    BadInput(
        "a bad line, prepared",
        _prepared("data.jsonl", LINE + "{oops\n"),
        r"data.jsonl:2: not valid JSON",
        r"one object a line",
        leaves=["prepared.parts*"],
    ),
]
