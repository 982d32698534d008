"""Best-of-n from scored samples, and the parts of a data file."""

import json
import math

import pytest
from helpers.debian_tldr import read_jsonl, run, write_jsonl


@pytest.fixture
def files(tmp_path):
    def sample(text, reward):
        return {"text": text, "tokens": [5] * len(text.split()) + [2], "finished": True, "reward": reward}

    samples = [
        {"id": "a", "responses": [sample(" wrong", 0.1), sample(" a tool", 0.7), sample(" the best of all", 2.0)]},
        {"id": "b", "responses": [sample(" right words", 0.9), sample(" wrong", 0.2), sample(" none", 0.3)]},
    ]
    rows = [
        {
            **{"id": name, "prompt": f"about {name}\nTL;DR:", "reference": reference, "baseline": " wrong"},
            **{"policy": " wrong", "length/baseline": 2, "unfinished/baseline": 0.0, "reward/policy": 0.0},
            **{"reward/baseline": 0.5, "reward/reference": 0.8, "judge/baseline": 0.0, "judge/reference": 1.0},
        }
        for name, reference in (("a", " a tool"), ("b", " right words"), ("c", " not sampled"))
    ]
    (tmp_path / "prior.json").write_text(json.dumps({"rows": rows}))
    return write_jsonl(tmp_path / "samples.jsonl", samples), tmp_path / "prior.json", tmp_path / "out.json"


def evaluate(example, monkeypatch, files, count):
    samples, prior, output = files
    options = ("--posterior-data", samples, "--evaluation", prior, "--output", output, "--judge", "score_rouge")
    run(example.best_of_n, monkeypatch, *options, "--n", count)
    return json.loads(output.read_text())


def test_the_sample_with_the_largest_reward_among_the_first_n_is_the_answer(example, monkeypatch, files):
    report = evaluate(example, monkeypatch, files, 2)
    assert [row["policy"] for row in report["rows"]] == [" a tool", " right words"]
    assert [row["length/policy"] for row in report["rows"]] == [3, 3]
    value = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert report["num_prompts"] == 2
    assert value["reward/policy"] == value["reward/plain"] == pytest.approx(0.8)
    assert value["judge/policy"] == 1.0
    # The SFT model's answers have another temperature.
    assert not [name for name in value if "vs_baseline" in name or name in ("reward/baseline", "judge/baseline")]
    assert value["win_rate/reward/policy_vs_reference"] == 0.5
    assert "kl_to_prior" not in value and value["kl_to_prior_at_most"] == pytest.approx(math.log(2) - 0.5)
    assert evaluate(example, monkeypatch, files, 3)["rows"][0]["policy"] == " the best of all"


def test_too_few_samples_and_prompts_that_were_not_evaluated_are_named(example, monkeypatch, files):
    with pytest.raises(example.user_errors.UserError, match="a has 3 samples: --n 4"):
        evaluate(example, monkeypatch, files, 4)
    samples = read_jsonl(files[0])
    write_jsonl(files[0], [samples[0] | {"id": "z"}])
    with pytest.raises(example.user_errors.UserError, match="z has samples, but is not in --evaluation"):
        evaluate(example, monkeypatch, files, 2)


def test_parts_follow_one_another_and_a_file_that_is_too_short_is_named(example, monkeypatch, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", [{"number": number} for number in range(10)])
    run(example.split_data, monkeypatch, "--data", data, "--out", tmp_path / "parts", "a=3", "b=4")
    assert [row["number"] for row in read_jsonl(tmp_path / "parts/a.jsonl")] == [0, 1, 2]
    assert [row["number"] for row in read_jsonl(tmp_path / "parts/b.jsonl")] == [3, 4, 5, 6]
    with pytest.raises(example.user_errors.UserError, match="b would have 2 lines"):
        run(example.split_data, monkeypatch, "--data", data, "--out", tmp_path / "parts", "a=8", "b=4")
    with pytest.raises(example.user_errors.UserError, match="expected NAME=COUNT"):
        run(example.split_data, monkeypatch, "--data", data, "--out", tmp_path / "parts", "a:8")
