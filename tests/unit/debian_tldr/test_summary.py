"""The summary: numbers of the files, and names of what is missing."""

import json
from pathlib import Path

import pytest
from helpers.debian_tldr import run, words, write_jsonl


@pytest.fixture
def results(tmp_path) -> dict[str, Path]:
    example_row = {
        "prompt": words(60, 1) + "\nTL;DR:", "reference": " human text", "baseline": " [sft] text", "response": " new",
    }  # fmt: skip
    evaluation = {
        "num_prompts": 300,
        "metrics": {"judge/win_rate": {"value": 0.61234, "low": 0.55, "high": 0.67}},
        "examples": [example_row] * 4,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return {
        "--sft-metrics": write_jsonl(
            tmp_path / "sft.jsonl",
            [
                {"iteration": 0, "validation/loss": 3.25},
                {"iteration": 1, "loss": 9.0},
                {"iteration": 5, "validation/loss": 2.5},
                {"iteration": 9, "loss": 1.0, "validation/loss": 2.125},
            ],
        ),
        "--reward-metrics": write_jsonl(
            tmp_path / "reward.jsonl",
            [
                {"iteration": 4, "validation/accuracy": 0.5},
                {"iteration": 8, "validation/accuracy": 0.75, "validation/accuracy/samples": 0.625},
            ],
        ),
        "--brain-metrics": write_jsonl(
            tmp_path / "brain.jsonl", [{"iteration": 1, "loss": 0.5}, {"iteration": 2, "loss": 0.25}]
        ),
        "--evaluation": tmp_path / "evaluation.json",
    }


def flags(results: dict[str, Path]) -> list[object]:
    return [item for pair in results.items() for item in pair]


def test_summary_shows_the_numbers_of_the_files(example, results, monkeypatch, capsys):
    run(example.summary, monkeypatch, *flags(results))
    printed = capsys.readouterr().out
    shown = (
        "3.250 (iteration 0)", "2.125 (iteration 9)", "0.750 (iteration 8)", "0.625 (iteration 8)",
        "0.5000 (iteration 1)", "0.2500 (iteration 2)", "300 held-out", "0.612", "0.550 to 0.670", "[sft] text",
    )  # fmt: skip
    for text in shown:
        assert text in printed, text
    assert "9.0" not in printed and "2.500" not in printed
    assert printed.count("human text") == 3
    assert printed.isascii() and "TL;DR" not in printed
    assert " ..." in printed and words(60, 1).split()[-1] not in printed


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--sft-metrics",
            "1 lines have 'validation/loss', the summary needs 2; keys found: iteration, validation/loss",
        ),
        ("--reward-metrics", "0 lines have 'validation/accuracy'"),
        ("--brain-metrics", "0 lines have 'loss'"),
    ],
)
def test_summary_names_a_number_that_is_missing(example, results, monkeypatch, flag, message):
    write_jsonl(results[flag], [{"iteration": 0, "validation/loss": 1.0}])
    with pytest.raises(example.user_errors.UserError, match=message):
        run(example.summary, monkeypatch, *flags(results))


def test_summary_names_every_missing_key_of_the_evaluation(example, results, monkeypatch):
    broken = {"metrics": {"kl": {"value": 1.0, "low": 0.5}}, "examples": [{"prompt": "p", "reference": "r"}]}
    results["--evaluation"].write_text(json.dumps(broken))
    with pytest.raises(
        example.user_errors.UserError, match="num_prompts, metrics/kl/high, examples/0/baseline, examples/0/response"
    ):
        run(example.summary, monkeypatch, *flags(results))
    results["--evaluation"].write_text(json.dumps({"num_prompts": 1, "metrics": {}, "examples": []}))
    with pytest.raises(example.user_errors.UserError, match="has 0 examples, --examples asks for 3"):
        run(example.summary, monkeypatch, *flags(results))


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.51, 0.62, "BRAIn's answers are better than SFT's: win-rate 0.560, 95% interval 0.510 to 0.620."),
        (0.38, 0.49, "BRAIn's answers are worse than SFT's"),
        (0.5, 0.62, "no difference between BRAIn and SFT is shown"),
    ],
)
def test_summary_says_in_words_what_an_interval_shows(example, results, monkeypatch, capsys, low, high, told):
    path = results["--evaluation"]
    evaluation = json.loads(path.read_text())
    metric = {"value": 0.56, "low": low, "high": high}
    evaluation["metrics"]["win_rate/judge/policy_vs_baseline"] = metric
    path.write_text(json.dumps(evaluation))
    run(example.summary, monkeypatch, *flags(results))
    printed = capsys.readouterr().out
    assert f"Under the judge, {told}" in printed
    assert "Under the reward model" not in printed, "there is no such number"
    assert "Another seed gives another policy" in printed


def test_summary_without_win_rates_says_nothing_in_words(example, results, monkeypatch, capsys):
    run(example.summary, monkeypatch, *flags(results))
    assert "Under the" not in capsys.readouterr().out
