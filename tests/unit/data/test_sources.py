import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_brain.data import tables
from megatron_brain.data.sources import load_records
from megatron_brain.errors import ConfigError, RecordError, UserError

ROWS = [{"prompt": f"p{i}", "completion": f"c {i} \u2028 é"} for i in range(5)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def fields(records):
    return [record for _, record in records]


def test_every_kind_of_source_gives_the_same_records(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    write_jsonl(tmp_path / "lines.json")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "array.json", "lines.json", "a.parquet", "stream.arrow", "file.arrow", "saved"):
        assert fields(load_records(str(tmp_path / name))) == ROWS, name


def test_records_carry_file_and_line_or_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 2}')
    assert load_records(str(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load_records(str(tmp_path / "a.parquet"))[4][0] == f"{tmp_path}/a.parquet[4]"


def test_glob_reads_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"from": name}])
    assert [r["from"] for r in fields(load_records(f"{tmp_path}/*.jsonl"))] == ["a", "b", "c"]


def test_limit_reads_no_further(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "not json\n")
    assert fields(load_records(str(path), limit=5)) == ROWS


def test_saved_dataset_dict_needs_a_split_it_has(tmp_path):
    source = str(tmp_path / "saved")
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part.select([1])}).save_to_disk(source)
    assert load_records(source, split="test") == [(f"{source}[test][0]", ROWS[1])]
    for split in (None, "validation"):
        with pytest.raises(ConfigError, match=rf"no split {split!r}; it has train, test"):
            load_records(source, split=split)


def test_hub_names_go_through_datasets(monkeypatch):
    def load_dataset(name):
        assert name == "trl-lib/tldr"
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records("trl-lib/tldr", split="train")[2] == ("trl-lib/tldr[train][2]", ROWS[2])


def test_a_name_that_is_neither_file_nor_hub_data_set_says_where_it_looked(monkeypatch, tmp_path):
    def load_dataset(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/data/train\).*hub \(ConnectionError: no network"):
        load_records("data/train")
    for missing in ("data/train.jsonl", "a/b/c", "nothing*.jsonl"):
        with pytest.raises(ConfigError, match=re.escape(f"{missing}: no such file (looked for {tmp_path}/{missing})")):
            load_records(missing)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b'["prompt"]', "must be a JSON object with named fields, not list"),
        (b'{"prompt": "\xff"}', "not UTF-8 text .invalid start byte at byte 12.: write the file as UTF-8"),
        (b'{"prompt": "\xed\xa0\xbd"}', "not UTF-8 text"),
        (rb'{"prompt": "\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n' + line + b"\n")
    with pytest.raises(RecordError, match=f"bad.jsonl:2: .*{message}"):
        load_records(str(path))


def test_empty_unknown_and_damaged_files_are_named(tmp_path):
    for name, content, message in [
        ("empty.jsonl", b"\n", "file is empty"),
        ("empty.json", b"[]", "file is empty"),
        ("a.csv", b"a,b", "unknown kind of file; must be one of .jsonl"),
        ("bad.parquet", b"no parquet at all", "cannot be read as parquet"),
        ("bad.arrow", b"no arrow at all", "cannot be read as arrow"),
        ("bad.json", b'[{"a": 1},', "not valid JSON"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            load_records(str(tmp_path / name))


def test_one_empty_file_of_a_glob_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ConfigError, match=r"b.jsonl: the file is empty"):
        load_records(f"{tmp_path}/*.jsonl")


def test_a_folder_of_files_suggests_a_glob(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"save_to_disk did not write.*\*\.jsonl"):
        load_records(str(tmp_path))


def test_a_byte_order_mark_may_stand_before_any_file_and_alone(tmp_path):
    mark, lines = b"\xef\xbb\xbf", [json.dumps(row).encode() for row in ROWS]
    for data in (mark + b"\n".join(lines), b"\n".join([mark, *lines]), (b"\n" + mark).join(lines)):
        (tmp_path / "a.jsonl").write_bytes(data)
        assert fields(load_records(str(tmp_path / "a.jsonl"))) == ROWS


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_a_saved_data_set_has_its_records_whatever_format_it_was_saved_in(form, tmp_path):
    """Such a format makes arrays of numbers, and may name some columns alone."""
    rows = [{**row, "margin": 0.5} for row in ROWS]
    data = datasets.Dataset.from_list(rows).with_format(form, columns=["margin"])
    data.save_to_disk(str(tmp_path / "saved"))
    assert fields(load_records(str(tmp_path / "saved"))) == rows


@pytest.mark.parametrize(("creator", "item"), [("another", {"item": {}}), ("polars", {})])
def test_structs_of_nulls_are_absent_where_their_writer_cannot_say_so_otherwise(creator, item, tmp_path, monkeypatch):
    """Polars before 1.0 kept no account of structs that are not there. A struct of nulls is {} otherwise."""
    path = tmp_path / "a.parquet"
    tool = {"name": "f", "city": {"type": "string"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"tools": [{**tool, "item": {"type": None}}]}]), path)
    if creator == "polars":
        monkeypatch.setattr(tables, "_WITHOUT_STRUCTS", pyarrow.parquet.ParquetFile(path).metadata.created_by)
    assert fields(load_records(str(path))) == [{"tools": [{**tool, **item}]}]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_that_cannot_be_read_is_named_with_its_row(kind, tmp_path):
    """A date behind the year 9999 has no value in Python."""
    when = pyarrow.array([0, 10**15, 0, 0, 0], pyarrow.timestamp("s"))
    table = pyarrow.Table.from_pylist(ROWS).append_column("when", when)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    place = re.escape(f"{path}[1]: field 'when' has a value that cannot be read")
    with pytest.raises(RecordError, match=f"{place} .*write the table anew, without the column"):
        load_records(str(path))
