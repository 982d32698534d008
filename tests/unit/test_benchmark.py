"""The benchmark on a tiny model: what it reports, and that it notices when the two sides do not compute the same."""

import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
FP8 = ["--load", "nowhere", "--prior-load", "nowhere", "--prompts", "nowhere"]
TINY = [
    *("--layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--heads", "4", "--key-value-heads", "2"),
    *("--vocab-size", "330", "--threads", "1", "--pairs", "2"),
]
GROUP = ["--prompt-length", "12", "--samples", "4", "--response-length", "6", "--response-spread", "2"]


@pytest.fixture
def benchmark(single, monkeypatch):
    """A function that imports a module of tools/; threads are those of before afterwards."""
    monkeypatch.syspath_prepend(TOOLS)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def run(benchmark, capsys, *flags):
    """Exit status, the JSON on standard output, and standard error."""
    status = benchmark("benchmark").main(["update", *TINY, *flags])
    said = capsys.readouterr()
    return status, json.loads(said.out), said.err


def test_a_report_says_what_was_measured_and_on_what(benchmark, capsys, tmp_path):
    output = tmp_path / "folder" / "report.json"
    flags = (*GROUP, "--line-samples", "2,4,8", "--output", str(output))
    status, report, said = run(benchmark, capsys, *flags)
    assert (status, report["failures"]) == (0, [])
    assert json.loads(output.read_text()) == report
    assert report["subject"] == "update" and report["settings"]["samples"] == 4
    assert report["environment"]["threads"] == 1 and set(report["environment"]["versions"]) > {"torch", "transformers"}
    (update,) = report["update"]
    # 12 + (4 + 5 + 7 + 8) tokens against 4 rows of 12 + 8.
    assert (update["tokens_packed"], update["tokens_padded"]) == (36, 80)
    for timed in (update["update"], update["forward_backward"], report["scoring"]["scoring"]):
        assert timed["pairs"] == 2
        for kind in ("wall", "cpu"):
            assert 0 < timed[kind]["ratio_min"] <= timed[kind]["ratio"] <= timed[kind]["ratio_max"]
    assert "required_ratio" not in update, "nothing is required of this group"
    assert [point["tokens"] for point in report["line"]["wall"]["points"]] == [24, 36, 60]
    assert "update 12 + 4 x 6±2 2/2: ours" in said


@pytest.mark.parametrize("flags", [(), ("--untied", "--response-spread", "0")])
def test_both_sides_compute_the_same_loss_gradient_and_scores(benchmark, capsys, flags):
    status, report, _ = run(benchmark, capsys, *GROUP, "--only", "update,scoring", *flags)
    (update,) = report["update"]
    assert status == 0
    assert update["loss"]["ours"] > 0.01, "a loss of zero would compare nothing"
    for losses in (update["loss"], update["loss_after"]):
        assert losses["ours"] == pytest.approx(losses["baseline"], abs=1e-4)
    assert update["loss_after"]["ours"] != update["loss"]["ours"], "the timed updates move the weights"
    assert update["gradient"]["norm"] > 0 and update["gradient"]["worst_relative_error"] < 1e-4
    # 2 layers of 9 weights, embedding, final norm, and an output layer where it is not tied.
    assert update["gradient"]["tensors"] == 20 + ("--untied" in flags)
    assert all(error < 1e-5 for error in report["scoring"]["relative_error"].values())


def test_bfloat16_is_timed_and_its_differences_reported_without_a_verdict(benchmark, capsys):
    status, report, _ = run(benchmark, capsys, *GROUP, "--only", "update,scoring", "--dtype", "bfloat16")
    assert (status, report["failures"]) == (0, [])
    assert 1e-4 < report["update"][0]["gradient"]["relative_error"] < 0.2


def test_a_broken_gradient_fails_and_is_named(benchmark, capsys, monkeypatch):
    models = benchmark("benchmarks.models")
    right = models.OurPolicy.gradients

    def broken(self):
        gradients = right(self)
        gradients["model.layers.1.self_attn.k_proj.weight"] *= 1.5
        return gradients

    monkeypatch.setattr(models.OurPolicy, "gradients", broken)
    status, report, said = run(benchmark, capsys, *GROUP, "--only", "update")
    assert status == 1
    assert "most in model.layers.1.self_attn.k_proj.weight (5.0e-01)" in report["failures"][0]
    assert "FAILED: update 12 + 4 x 6±2: the gradient differs by" in said


def test_another_loss_and_other_scores_fail(benchmark, capsys, monkeypatch):
    models = benchmark("benchmarks.models")
    right = models.HFPolicy.logprobs
    monkeypatch.setattr(
        models.HFPolicy, "logprobs", lambda self, batch: right(self, batch) * (1 + torch.is_grad_enabled())
    )
    status, report, _ = run(benchmark, capsys, *GROUP, "--only", "update")
    assert status == 1 and "the losses are" in report["failures"][0]
    monkeypatch.setattr(models.HFPolicy, "logprobs", right)
    monkeypatch.setattr(models.HFReward, "rewards", lambda self, batch: torch.ones(4))
    status, report, _ = run(benchmark, capsys, *GROUP, "--only", "scoring")
    assert status == 1 and "reward differs by" in report["failures"][0]


def test_a_gradient_that_is_not_a_number_is_the_worst(benchmark):
    update = benchmark("benchmarks.update")
    ours = {"a": torch.tensor([1.0]), "b": torch.tensor([torch.nan])}
    difference = update.gradient_difference(ours, {"a": torch.tensor([2.0]), "b": torch.tensor([1.0])})
    assert difference["worst_tensor"] == "b"
    report = {"loss": {"ours": 1.0, "baseline": 1.0}, "gradient": difference}
    assert len(update.check_update(report, "update")) == 1
    with pytest.raises(AssertionError, match="different tensors: \\['b'\\]"):
        update.gradient_difference(ours, {"a": torch.tensor([2.0])})


def test_gradient_difference_by_hand(benchmark):
    difference = benchmark("benchmarks.update").gradient_difference(
        {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])},
        {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([2.0])},
    )
    assert difference["relative_error"] == pytest.approx((2 / 22) ** 0.5)
    assert difference["worst_tensor"] == "b" and difference["worst_relative_error"] == pytest.approx(0.5)


def test_without_sizes_both_required_groups_are_measured(benchmark):
    update = benchmark("benchmarks.update")
    parser = benchmark("argparse").ArgumentParser()
    update.add_arguments(parser)
    shapes = update._shapes(parser.parse_args([]))
    assert [(s.prompt_length, s.samples, s.response_length) for s in shapes] == list(update.REQUIRED)
    assert update._shapes(parser.parse_args(["--no-large"])) == shapes[:1]
    assert [s.samples for s in update._shapes(parser.parse_args(["--samples", "4"]))] == [4]
    timed = {"wall": {"ratio": 5.4}}
    assert update._required(update.REQUIRED, shapes[0], timed) == {"required_ratio": 5.5, "reached": False}


def test_pairs_alternate_in_order_and_ratios_are_of_pairs(benchmark, monkeypatch):
    timing = benchmark("benchmarks.timing")
    calls = []
    seconds = {"ours": iter([1.0, 2.0, 4.0]), "baseline": iter([6.0, 10.0, 28.0])}

    def measure(function):
        name = function()
        return timing.Times(next(seconds[name]), 1.0)

    monkeypatch.setattr(timing, "measure", measure)
    report = timing.compare(
        lambda: calls.append("A") or "ours", lambda: calls.append("B") or "baseline", pairs=3, warm_up=1
    )
    assert "".join(calls) == "AB" + "AB" + "BA" + "AB"
    wall = report["wall"]
    assert (wall["ratio"], wall["ratio_min"], wall["ratio_max"]) == (6.0, 5.0, 7.0)
    assert (wall["ours_seconds"], wall["baseline_seconds"]) == (2.0, 10.0)
    assert report["cpu"]["ratio"] == 1.0


def test_cost_line_by_hand(benchmark):
    cost_line = benchmark("benchmarks.cost_line").cost_line
    proportional = cost_line([2, 4, 8], [100, 200, 400], [1.0, 2.0, 4.0])
    assert proportional["slope_ratio"] == pytest.approx(1.0) and proportional["reached"]
    assert proportional["largest_deviation_from_median"] == pytest.approx(0.0)
    fixed_cost = cost_line([2, 4, 8], [100, 200, 400], [2.0, 3.0, 5.0])
    assert fixed_cost["intercept_seconds"] == pytest.approx(1.0)
    assert fixed_cost["slope_ratio"] == pytest.approx(0.01 / 0.015)
    assert not fixed_cost["reached"]
    assert statistics.median(p["ratio_to_median"] for p in fixed_cost["points"]) == 1.0


def test_mistakes_are_said_before_anything_is_measured(benchmark, capsys, monkeypatch):
    main = benchmark("benchmark").main
    cost_line = benchmark("benchmarks.cost_line")
    nothing_found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(cost_line, "importlib", nothing_found)
    for flags, message in (
        (["nothing"], "unknown subject 'nothing'"),
        (["update", "--only", "updates"], "no part 'updates'; there are update, scoring, line"),
        (["update", "--plot", "line.png"], "pip install matplotlib"),
        (["update", "--plot", "line.png", "--only", "update"], "add line to --only"),
        (["update", "--line-samples", "2,x,8"], "--line-samples 2,x,8: a line needs two different numbers"),
        (["update", *TINY, "--response-length", "4", "--response-spread", "4"], "a token in each"),
        (["fp8", *FP8, "--lengths", "16,x"], "--lengths 16,x: expected numbers"),
        (["fp8", *FP8, "--lengths", "0"], "--lengths 0: 0 is too small"),
        (["fp8", *FP8, "--lengths", "32", "--gradient-lengths", "16"], "16 is not in --lengths 32"),
        (["fp8", *FP8, "--samples", "1"], "--samples 1: must be at least 2"),
        (["fp8", *FP8, "--reward-temperature", "0"], "--reward-temperature 0.0: must be greater than 0"),
        (["fp8", *FP8], "nowhere"),
        (["memory", "--only", "sft; nothing"], "no case 'nothing'; there are: sft; sft, bf16"),
    ):
        assert main(flags) == 2
        said = capsys.readouterr()
        assert message in said.err and said.out == ""
