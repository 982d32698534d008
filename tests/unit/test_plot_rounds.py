"""The share of time in which training waited for responses."""

import json

import plot_rounds
import pytest


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def a_round(number, waiting, drawing):
    return {
        "round": number,
        "seconds_waiting_for_samples": waiting,
        "seconds_weight_sync": 1.0,
        "seconds_scoring": 2.0,
        "seconds_sampling": drawing,
        "seconds_per_step": 3.0,
    }


STEP = {"seconds_per_step": 3.0}
ROUNDS = [{"validation/kl": 1}, a_round(0, 9.0, 9.0), STEP, a_round(1, 1.0, 8.0), STEP]


def test_waiting_is_its_share_of_all_rounds_but_the_first(tmp_path, capsys):
    assert plot_rounds.main([write(tmp_path / "metrics.jsonl", *ROUNDS)]) == 0
    told = json.loads(capsys.readouterr().out)
    # Round 1: 1 s of waiting, 1 s of hand-over, 2 s of scoring, two steps of 3 s.
    assert told["waiting_fraction"] == pytest.approx(1 / 10)
    assert told["rounds"][1] == {"waiting": 1.0, "weight_sync": 1.0, "scoring": 2.0, "training": 6.0, "drawing": 8.0}


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "rounds.svg"
    assert plot_rounds.main([write(tmp_path / "metrics.jsonl", *ROUNDS), "--plot", str(figure)]) == 0
    assert "<svg" in figure.read_text()


@pytest.mark.parametrize(
    ("lines", "said"),
    [([{"round": 0, "seconds_per_step": 1.0}], "--engine vllm"), ([a_round(0, 1.0, 1.0)], "at least 2 are needed")],
)
def test_a_run_without_such_rounds_is_refused(lines, said, tmp_path, capsys):
    assert plot_rounds.main([write(tmp_path / "metrics.jsonl", *lines)]) == 2
    assert said in capsys.readouterr().err
