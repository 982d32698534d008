"""The data script: what it writes, reuses and refuses."""

import json

import pytest
from helpers.debian_tldr import origin_stanza, read_jsonl, run, stanza, words


@pytest.fixture
def lists() -> dict[str, list[str]]:
    names = [f"{words(1, i)}{words(1, -i)}" for i in range(60)]
    return {
        "Packages": ["\n".join(origin_stanza(name) for name in names)],
        "Translations": ["\n".join(stanza(name, "an ünusual tool", words(30, name)) for name in [*names, "orphan"])],
    }


def test_fetch_data_writes_pairs_and_a_manifest_that_adds_up(example, lists, monkeypatch, tmp_path):
    monkeypatch.setattr(example.fetch_data, "fetch_lists", lambda: lists)
    for folder in ("one", "two"):
        run(example.fetch_data, monkeypatch, "--out", tmp_path / folder, "--valid-share", 0.2, "--test-share", 0.2)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    counts = manifest["counts"]
    records = {name: read_jsonl(tmp_path / "one" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert {name: len(rows) for name, rows in records.items()} == counts["kept"]
    assert counts["listed"] == 61 == sum(counts["dropped"].values()) + sum(counts["kept"].values())
    for record in (row for rows in records.values() for row in rows):
        assert record["prompt"] == words(30, record["id"]) + "\nTL;DR:"
        assert record["completion"] == " an ünusual tool"
    for name in manifest["sha256"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_fetch_data_reuses_only_what_is_complete_and_the_same(example, lists, monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(example.fetch_data, "fetch_lists", lambda: calls.append(1) or lists)
    arguments = ("--out", tmp_path, "--valid-share", 0.2, "--test-share", 0.2)
    run(example.fetch_data, monkeypatch, *arguments)
    run(example.fetch_data, monkeypatch, *arguments)
    assert len(calls) == 1 and "used as it is" in capsys.readouterr().out
    with pytest.raises(example.user_errors.UserError, match="another --out"):
        run(example.fetch_data, monkeypatch, *arguments, "--seed", 1)
    (tmp_path / "manifest.json").rename(tmp_path / "kept")
    run(example.fetch_data, monkeypatch, *arguments)
    assert len(calls) == 2
    (tmp_path / "train.jsonl").write_text("changed\n")
    with pytest.raises(example.user_errors.UserError, match="differ from its manifest"):
        run(example.fetch_data, monkeypatch, *arguments)


def test_fetch_data_with_an_empty_split_writes_nothing(example, lists, monkeypatch, tmp_path):
    monkeypatch.setattr(example.fetch_data, "fetch_lists", lambda: lists)
    with pytest.raises(example.user_errors.UserError, match="no pair left for valid"):
        run(example.fetch_data, monkeypatch, "--out", tmp_path / "data", "--valid-share", 1e-9)
    assert not (tmp_path / "data").exists()


def test_machine_without_apt_is_told_what_to_do(example, monkeypatch):
    monkeypatch.setattr(example.fetch_data.shutil, "which", lambda name: None)
    with pytest.raises(example.user_errors.UserError, match="Debian or Ubuntu"):
        example.fetch_data.fetch_lists()
