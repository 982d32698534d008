"""Preparing a corpus: one result whoever makes it and however often it is stopped; its statistics; its errors."""

import dataclasses
import functools
import importlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest
from helpers.reading import reading_settings

from megatron_brain.data.corpus import read_corpus
from megatron_brain.data.prepared import preparation
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.workers import WorkerKilledError, map_in_order
from megatron_brain.errors import ConfigError, RecordError

WORDS = ["the", "quick", "brown", "fox", "over", "lazy", "dog", "again", "hello", "world", "fast", "small", "editor"]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """300 records, a tenth of which are repeated."""
    rng = random.Random(3)

    def text(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    records = [{"prompt": text(12), "completion": f" {text(9)}"} for _ in range(270)]
    records += records[:30]
    rng.shuffle(records)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def make_job(corpus, hf_dir, tmp_path):
    def make_job(name="out", form="indexed", workers=1, source=None, **limits):
        from megatron_brain.config.data import DataConfig

        reading = reading_settings(
            stage="sft",
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=hf_dir,
            limits=DataConfig(**{"seq_length": 60, "overlong": "drop", **limits}),
        )
        prefix = str(tmp_path / name / "data")
        return Preparation(
            input=str(source or corpus), split=None, prefix=prefix, format=form, reading=reading, workers=workers
        )

    return make_job


def load_tool(name):
    return importlib.import_module(f"megatron_brain.commands.{name}")


def files(job) -> dict[str, bytes]:
    """Contents of the result by the end of its name."""
    folder = Path(job.prefix).parent
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_result_does_not_depend_on_the_number_of_workers(make_job, monkeypatch):
    # Arrow, here and below, so that the processes need not import megatron-core.
    monkeypatch.setattr(preparation, "RECORDS_PER_PART", 40)
    one, two = make_job("one", "arrow"), make_job("two", "arrow", workers=2)
    prepare(one)
    prepare(two)
    assert files(one) == files(two)
    assert list(files(one)) == ["data.arrow", "data.json"], "parts are left behind"


def test_a_preparation_killed_in_the_middle_goes_on_to_the_same_result(make_job, monkeypatch):
    whole, killed = make_job("whole", "arrow"), make_job("killed", "arrow", workers=2)
    monkeypatch.setattr(preparation, "RECORDS_PER_PART", 10)
    prepare(whole)
    code = (
        "import pickle, sys, time; from megatron_brain.data.prepared import preparation\n"
        "preparation.RECORDS_PER_PART = 10\n"
        "if __name__ == '__main__':\n"
        "    slow = preparation._cut\n"
        "    preparation._cut = lambda records: (time.sleep(0.1) or part for part in slow(records))\n"
        "    preparation.prepare(pickle.load(sys.stdin.buffer))\n"
    )
    script = Path(killed.prefix).parent.with_suffix(".py")
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdin.write(pickle.dumps(killed))
    process.stdin.close()
    parts = Path(f"{killed.prefix}.parts")
    deadline = time.monotonic() + 60
    while not (parts / "000003").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=20)[1], "workers outlive their parent"
    finished = {int(part.name) for part in parts.glob("0*") if part.suffix == ""}
    assert 0 < len(finished) < 30 and not Path(f"{killed.prefix}.json").exists(), "killed too early or too late"
    written = []
    real = preparation._write_part
    monkeypatch.setattr(
        preparation, "_write_part", lambda worker, part: written.append(part.number) or real(worker, part)
    )
    prepare(make_job("killed", "arrow", workers=1))
    assert files(killed) == files(whole)
    assert sorted([*written, *finished]) == list(range(30)), "finished parts were made again"


def test_leftovers_of_another_preparation_are_refused_with_what_differs(make_job, corpus, monkeypatch):
    monkeypatch.setattr(preparation, "RECORDS_PER_PART", 40)
    monkeypatch.setattr(preparation, "_merge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(make_job())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"settings.seq_length was 60, is now 61\..* or remove .*data.parts"):
        prepare(make_job(seq_length=61))
    os.utime(corpus, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"source.files.0.changed_ns was \d+, is now 1\."):
        prepare(make_job())


def test_a_complete_result_is_kept_and_not_overwritten_by_another(make_job):
    info = prepare(make_job())
    before = files(make_job())
    assert prepare(make_job()) == info and files(make_job()) == before
    with pytest.raises(ConfigError, match="settings.overlong was drop, is now truncate"):
        prepare(make_job(overlong="truncate"))
    assert files(make_job()) == before


def test_statistics_are_those_of_the_items(make_job, hf, corpus, monkeypatch):
    monkeypatch.setattr(preparation, "RECORDS_PER_PART", 40)
    info = prepare(make_job())
    items = read_corpus(str(corpus), make_job().reading.build()).items
    lengths = numpy.array([[len(item.prompt), len(item.responses[0])] for item in items])
    unique = {(item.prompt, item.responses) for item in items}
    assert info.counts["read"] == 300 and info.counts["kept"] == len(items) < 300
    assert info.counts["duplicates"] == len(items) - len(unique) > 0
    assert info.counts["dropped_overlong"] == 300 - len(items)
    shown = info.statistics["lengths"]
    assert [shown[name]["max"] for name in ("prompt", "response", "total")] == [
        *lengths.max(axis=0),
        lengths.sum(axis=1).max(),
    ]
    assert shown["prompt"]["p50"] == sorted(lengths[:, 0])[(len(items) - 1) // 2]
    assert info.statistics["tokens"] == lengths.sum()
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    texts = [text for record in records for text in record.values()]
    tokens = sum(len(ids) for ids in hf.encode_batch(texts)) + 300  # one EOS each
    assert info.statistics["bytes_per_token"] == pytest.approx(sum(map(len, texts)) / tokens, abs=1e-3)


def test_a_part_of_which_nothing_is_kept_is_no_hindrance(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "RECORDS_PER_PART", 2)
    source = tmp_path / "few.jsonl"
    lengths = (1, 1, 200, 200, 1)
    source.write_text("".join(json.dumps({"prompt": "p" * n, "completion": "c"}) + "\n" for n in lengths))
    for form in ("indexed", "arrow"):
        job = make_job(form, form, source=source)
        prepare(job)
        assert [item.record_id for item in read_corpus(job.prefix, job.reading.build()).items] == [
            f"{source}:{line}" for line in (1, 2, 5)
        ]


def test_a_bad_record_stops_it_with_its_place_and_leaves_nothing_that_looks_complete(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "RECORDS_PER_PART", 2)
    lines = ['{"prompt": "p", "completion": "c"}'] * 9
    lines[4] = '{"prompt": "p"}'
    lines[6] = "no json"
    source = tmp_path / "bad.jsonl"
    source.write_text("\n".join(lines))
    with pytest.raises(RecordError, match="bad.jsonl:5: field 'completion' is missing"):
        prepare(make_job(form="arrow", source=source))
    assert not list((tmp_path / "out").glob("data.[!p]*"))


def test_a_preparation_that_finished_no_part_may_be_begun_anew_with_other_settings(make_job, tmp_path):
    source = tmp_path / "bad.jsonl"
    source.write_text('{"prompt": "p"}\n')
    with pytest.raises(RecordError, match="'completion' is missing"):
        prepare(make_job(source=source))
    (tmp_path / "out" / "data.parts" / "plan.json.partial").write_text("killed in the middle of it")
    source.write_text('{"prompt": "p", "completion": "c"}\n')
    assert prepare(make_job(source=source, seq_length=50)).settings["seq_length"] == 50


@pytest.mark.parametrize("prefix", ["corpus.jsonl/data", "folder/"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(prefix, make_job, tmp_path):
    job = dataclasses.replace(make_job(), prefix=f"{tmp_path}/{prefix}")
    with pytest.raises(ConfigError, match="--output"):
        prepare(job)


def test_prepared_data_are_no_records_to_prepare(make_job):
    prepare(make_job())
    with pytest.raises(ConfigError, match=r"data.bin: is prepared data, not records; it was made of .*corpus.jsonl"):
        prepare(make_job("again", source=f"{make_job().prefix}.bin"))


def test_a_killed_worker_process_is_told_in_a_line(capsys, tmp_path, hf_dir, corpus, monkeypatch):
    with pytest.raises(WorkerKilledError, match="try fewer --workers"):
        list(map_in_order(pow, [1], workers=2, set_up=functools.partial(os._exit, 3)))
    for name, work in ("preprocess_data", "prepare"), ("check_data", "check"):
        tool = load_tool(name)
        monkeypatch.setattr(tool, work, lambda *_, **__: (_ for _ in ()).throw(WorkerKilledError("fewer")))
        output = ["--output", str(tmp_path / "out")] if name == "preprocess_data" else []
        assert tool.main(["--stage", "sft", "--input", str(corpus), "--hf-model", hf_dir, *output]) == 2
        assert capsys.readouterr().err.endswith("error: fewer\n")


def test_two_preparations_of_one_output_do_not_mix(make_job):
    job = make_job()
    refused = pytest.raises(ConfigError, match="another process is preparing this output")
    with preparation._locked(preparation._parts_folder(job)), refused:
        prepare(job)


def test_the_tool_prints_the_statistics_and_tells_mistakes(corpus, hf_dir, tmp_path, capsys):
    tool = load_tool("preprocess_data")
    flags = ["--stage", "sft", "--input", str(corpus), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert tool.main([*flags, "--overlong", "drop", "--seq-length", "60"]) == 2
    assert "no tokenizer: give --tokenizer-model, or --load or --hf-model" in capsys.readouterr().err
    flags += ["--hf-model", hf_dir]
    assert tool.main([*flags, "--seq-length", "30"]) == 2
    assert "too long" in capsys.readouterr().err
    assert tool.main([*flags, "--output", str(tmp_path / "other"), "--overlong", "drop", "--seq-length", "60"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("dropped overlong", "duplicates", "bytes per token", "p99", "prompt"))
