"""Preference pairs: every kind, every count."""

import random
from collections import Counter
from pathlib import Path

import pytest
from helpers.debian_tldr import read_jsonl, run, words, write_jsonl


def test_nearest_record_is_on_topic_and_never_itself(example):
    prompts = ["chess engine board", "opera music player", "chess clock board timer", "player for opera recordings"]
    records = [{"prompt": prompt + "\nTL;DR:"} for prompt in prompts]
    order = example.make_preferences.nearest_records(records, [0, 1, 3], batch=2)
    assert [row[0] for row in order] == [2, 3, 1]
    assert all(len(row) == 3 and index not in row for index, row in zip([0, 1, 3], order, strict=True))


def test_neighbour_that_says_the_same_is_passed_over(example):
    pick = example.make_preferences.neighbour_completion
    assert pick(" Viewer for PDF files", [" viewer for pdf documents", " clock for the desktop"]) == (
        " clock for the desktop"
    )
    assert pick(" a b c", [" A b c", " a b"]) is None


def test_degraded_texts_are_what_their_kind_says(example):
    degrade = example.make_preferences.degraded_completion
    prompt, chosen = "The first words of it and more\nTL;DR:", " one two three four"
    for seed in range(20):
        rng = random.Random(seed)
        assert degrade("first-words", prompt, chosen, rng) == " The first words of"
        cut = degrade("cut", prompt, chosen, rng)
        assert chosen.startswith(cut) and 1 <= len(cut.split()) < 4
        shuffled = degrade("shuffled", prompt, chosen, rng)
        assert shuffled is None or (shuffled != chosen and sorted(shuffled.split()) == sorted(chosen.split()))
    assert degrade("shuffled", prompt, " same same", random.Random(0)) is None
    assert degrade("cut", prompt, " single", random.Random(0)) is None
    assert degrade("first-words", prompt, " the FIRST words", random.Random(0)) is None


def test_sample_pairs_are_best_against_worst_outside_the_margin(example):
    values = {"good": 0.9, "fair": 0.5, "bad": 0.2, "near": 0.45}

    def judge(prompts, responses, references):
        return [values[response] for response in responses]

    responses = [["fair", "good", "bad"], ["fair", "near"], ["good", " "], [""]]
    samples = [{"prompt": f"p{i}", "reference": "r", "responses": row} for i, row in enumerate(responses)]
    left_out: Counter = Counter()
    pairs = example.make_preferences.sample_pairs(samples, judge, 0.1, left_out)
    assert pairs == [{"prompt": "p0", "chosen": "good", "rejected": "bad", "kind": "samples"}]
    assert left_out == {
        "samples: empty response": 2,
        "samples: scores closer than 0.1": 1,
        "samples: prompt with fewer than two responses": 2,
    }
    assert len(example.make_preferences.sample_pairs(samples, judge, 0.01, Counter())) == 2


@pytest.fixture
def sft_file(tmp_path) -> Path:
    records = [
        {"id": f"p{i}", "prompt": words(30, i) + "\nTL;DR:", "completion": " " + words(6, f"c{i}")} for i in range(80)
    ]
    return write_jsonl(tmp_path / "sft.jsonl", records)


def test_preferences_hold_out_prompts_and_count_every_pair(example, sft_file, monkeypatch, tmp_path, capsys):
    samples = [
        {"id": row["id"], "prompt": row["prompt"], "reference": row["completion"], "responses": answers}
        for index, row in enumerate(read_jsonl(sft_file)[:20])
        for answers in [[row["completion"], " other"] if index < 15 else [" x", " y"]]
    ]
    sample_file = write_jsonl(tmp_path / "samples.jsonl", samples)
    arguments = ("--sft", sft_file, "--samples", sample_file, "--judge", "score_rouge", "--valid-share", 0.3)
    for folder in ("one", "two"):
        run(example.make_preferences, monkeypatch, *arguments, "--out", tmp_path / folder)
    printed = capsys.readouterr().out
    train, valid = (read_jsonl(tmp_path / "one" / f"{name}.jsonl") for name in ("train", "valid"))
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in valid)
    kinds = Counter(row["kind"] for row in train + valid)
    assert kinds["nearest"] == 80 and kinds["samples"] == 15
    assert kinds["first-words"] + kinds["cut"] + kinds["shuffled"] == 80
    assert f"{len(train)} pairs" in printed and "left out: 5 samples: scores closer than 0.1" in printed
    assert all(row["chosen"].strip() and row["chosen"] != row["rejected"] for row in train + valid)
    assert [row["kind"] for row in train] != sorted(row["kind"] for row in train)
    assert (tmp_path / "one" / "train.jsonl").read_bytes() == (tmp_path / "two" / "train.jsonl").read_bytes()


def test_preferences_can_pair_a_part_of_the_packages(example, sft_file, monkeypatch, tmp_path):
    arguments = ("--sft", sft_file, "--out", tmp_path / "out", "--valid-share", 0.3, "--packages")
    run(example.make_preferences, monkeypatch, *arguments, 20)
    rows = [row for name in ("train", "valid") for row in read_jsonl(tmp_path / "out" / f"{name}.jsonl")]
    assert len({row["prompt"] for row in rows}) == 20 and len(rows) == 40
    with pytest.raises(example.user_errors.UserError, match=r"--packages 81.*80 records"):
        run(example.make_preferences, monkeypatch, *arguments, 81)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2: not JSON"), ('{"prompt": "p"}', "line 2: needs a key 'completion'"), ("[]", "line 2: needs a key")],
)
def test_bad_line_is_named(example, tmp_path, line, message):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n' + line + "\n")
    with pytest.raises(example.user_errors.UserError, match=message):
        example.make_preferences.read_jsonl(path, {"prompt": str, "completion": str})
