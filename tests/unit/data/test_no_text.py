"""What is no text, in every kind of file: told with the file and the line or row by all that read records."""

import gzip
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.reading import reading_settings

from megatron_brain.config.data import DataConfig
from megatron_brain.data.checking import check
from megatron_brain.data.corpus import read_corpus
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.tokenizer.training import Lines
from megatron_brain.errors import ConfigError, RecordError

FINE = {"prompt": "hello", "completion": "world"}
PROMPTS = [f"hello {n}".encode() for n in range(6)]
HALF = b"\xed\xa0\xbd"
"""A surrogate alone, as CESU-8 and Java write them."""
BYTES = {"half a surrogate": HALF, "Latin-1": b"caf\xe9", "cut in a character": "漢".encode()[:2]}
LAST = 5


def strings(values):
    """An Arrow array of texts that nobody has looked into, as other writers leave them."""
    offsets, data = [0], b""
    for value in values:
        data += value
        offsets.append(len(data))
    buffers = [None, pyarrow.array(offsets, pyarrow.int32()).buffers()[1], pyarrow.py_buffer(data)]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)


def table(bad, *, nested=False):
    """Records, of which the last one is no text."""
    texts = [b"world"] * LAST + [bad]
    if not nested:
        return pyarrow.table({"prompt": strings(PROMPTS), "completion": strings(texts)})
    parts = [part for prompt, text in zip(PROMPTS, texts, strict=True) for part in (prompt, text)]
    roles = [b"user", b"assistant"] * (LAST + 1)
    messages = pyarrow.StructArray.from_arrays([strings(roles), strings(parts)], ["role", "content"])
    offsets = pyarrow.array(range(0, 2 * LAST + 3, 2), pyarrow.int32())
    return pyarrow.table({"messages": pyarrow.ListArray.from_arrays(offsets, messages)})


def write_lines(path, bad):
    said = [b"world"] * LAST + [bad]
    lines = [b'{"prompt": "%s", "completion": "%s"}' % pair for pair in zip(PROMPTS, said, strict=True)]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_zst(path, bad):
    write_lines(path.with_suffix(""), bad)
    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as packed:
        packed.write(path.with_suffix("").read_bytes())
    path.with_suffix("").unlink()


def write_arrow(path, bad, new):
    rows = table(bad, nested="nested" in path.name)
    with new(str(path), rows.schema) as writer:
        writer.write_table(rows)


def write_saved(path, bad):
    """A folder of `datasets`, with its table replaced."""
    rows = table(bad)
    datasets.Dataset(table(b"fine")).save_to_disk(str(path))
    with pyarrow.ipc.new_stream(str(path / "data-00000-of-00001.arrow"), rows.schema) as writer:
        writer.write_table(rows)


SOURCES = {
    "a.jsonl": write_lines,
    "a.json": write_lines,
    "a.jsonl.gz": write_lines,
    "a.json.gz": write_lines,
    "a.jsonl.zst": write_zst,
    "a.parquet": lambda path, bad: pyarrow.parquet.write_table(table(bad), path),
    "nested.parquet": lambda path, bad: pyarrow.parquet.write_table(table(bad, nested=True), path),
    "stream.arrow": lambda path, bad: write_arrow(path, bad, pyarrow.ipc.new_stream),
    "nested.arrow": lambda path, bad: write_arrow(path, bad, pyarrow.ipc.new_stream),
    "file.arrow": lambda path, bad: write_arrow(path, bad, pyarrow.ipc.new_file),
    "saved": write_saved,
}


def settings(hf_marked, stage="sft"):
    limits = DataConfig(seq_length=64)
    return reading_settings(
        stage=stage,
        tokenizer_type=hf_marked.tokenizer_type,
        tokenizer_model=hf_marked.hf.name_or_path,
        limits=limits,
        max_new_tokens=8,
    )


@pytest.mark.parametrize("bad", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("name", SOURCES)
def test_the_record_that_is_no_text_is_named(name, bad, hf_marked, tmp_path):
    path = tmp_path / name
    SOURCES[name](path, bad)
    place = f"{path}:{LAST + 1}" if ".json" in name else f"{path}[{LAST}]"
    expected = f"^{re.escape(place)}: .*not UTF-8 text .*: write the (file as UTF-8|table anew)"
    with pytest.raises(RecordError, match=expected):
        read_corpus(str(path), settings(hf_marked).build())
    job = Preparation(
        input=str(path), split=None, prefix=str(tmp_path / "out"), format="indexed", reading=settings(hf_marked)
    )
    with pytest.raises(RecordError, match=expected):
        prepare(job)
    assert not [left for left in tmp_path.glob("out*") if left.suffix in (".bin", ".idx", ".json")]
    report = check([str(path)], [], settings(hf_marked))
    [problem] = report.shown[True, "not UTF-8"]
    assert problem.where == place and problem.is_error
    assert report.reports[str(path)].read == LAST + 1 and report.total(errors=True) == 1
    lines = Lines(inputs=[str(path)])
    assert len(list(lines)) == 2 * LAST and re.search(expected, str(lines.error))


@pytest.mark.parametrize("stage", ["reward", "brain"])
def test_in_every_stage(stage, hf_marked, tmp_path):
    fields = {"prompt": "hello", "chosen": "world", "rejected": "no"}
    lines = [json.dumps(fields).encode(), json.dumps(fields).encode().replace(b"world", HALF)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(RecordError, match=r"a.jsonl:2: .*not UTF-8 text .*write the file as UTF-8"):
        read_corpus(str(tmp_path / "a.jsonl"), settings(hf_marked, stage).build())


@pytest.mark.parametrize("escape", [rb"\ud83d", rb"\udc00 \ud800", rb"x\uDBFF"])
@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "array.json", "key.jsonl", "nested.jsonl"])
def test_half_a_surrogate_that_is_escaped_is_none_either(kind, escape, hf_marked, tmp_path):
    line = {"a": rb'{"prompt": "?", "completion": "a"}', "k": rb'{"prompt": "a", "completion": "a", "?": 1}'}.get(
        kind[0], rb'{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]}'
    )
    fine = json.dumps(FINE).encode()
    lines = [fine, line.replace(b"?", escape)]
    data = b"[" + b",".join(lines) + b"]" if kind == "array.json" else b"\n".join(lines)
    (tmp_path / kind).write_bytes(data)
    place = r"array.json\[1\]" if kind == "array.json" else f"{kind}:2"
    with pytest.raises(RecordError, match=f"{place}: .*surrogate"):
        read_corpus(str(tmp_path / kind), settings(hf_marked).build())


def test_a_pair_of_escaped_surrogates_is_a_character(hf_marked, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"prompt": "\ud83d\ude42", "completion": "a"}')
    [group] = read_corpus(str(tmp_path / "a.jsonl"), settings(hf_marked).build()).items
    assert hf_marked.decode(group.prompt) == "🙂"


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("state", ["cut", "no archive", "empty"])
def test_a_compressed_file_that_is_damaged_is_named(kind, state, hf_marked, tmp_path):
    path = tmp_path / f"a.jsonl.{kind}"
    (write_lines if kind == "gz" else write_zst)(path, b"fine")
    data = {"cut": path.read_bytes()[:-12], "no archive": b'{"prompt": "a"}\n', "empty": b""}[state]
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{path}: (cannot be read|the file is empty)"):
        read_corpus(str(path), settings(hf_marked).build())


@pytest.mark.parametrize("escape", [r"\ud83d", r"\udc00 \ud800"])
def test_half_a_surrogate_in_a_column_of_json_is_none_either(escape, hf_marked, tmp_path):
    column = pyarrow.array([json.dumps("a"), f'"{escape}"', r'"\ud83d\ude00"'], pyarrow.json_())
    table = pyarrow.table({"prompt": ["a"] * 3, "completion": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RecordError, match=r"a.parquet\[1\]: field 'completion': .*surrogate"):
        read_corpus(str(tmp_path / "a.parquet"), settings(hf_marked).build())
    pyarrow.parquet.write_table(table.take([0, 2]), tmp_path / "b.parquet")
    assert len(read_corpus(str(tmp_path / "b.parquet"), settings(hf_marked).build()).items) == 2
