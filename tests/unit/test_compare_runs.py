"""Metrics of runs side by side, by hand."""

import json

import pytest

from megatron_brain.commands import compare_runs


@pytest.fixture
def compare():
    return compare_runs.main


def write(path, losses):
    lines = [{"iteration": i, "loss": loss, **({"round": i} if i % 2 else {})} for i, loss in enumerate(losses, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_means_are_of_windows_of_steps_as_far_as_all_runs_have_come(compare, tmp_path, capsys):
    one, other = write(tmp_path / "one", [4, 2, 1]), write(tmp_path / "other", [8, 6, 5, 100])
    assert compare([f"a={one}", f"b={other}", "--metrics", "loss,round", "--window", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| metric | run | steps 1-2 | steps 3-3 |",
        "| --- | --- | --- | --- |",
        "| loss | a | 3 | 1 |",
        "| loss | b | 7 | 5 |",
        "| round | a | 1 | 3 |",
        "| round | b | 1 | 3 |",
    ]


def test_numbers_that_are_not_finite_are_shown(compare, tmp_path, capsys):
    run = write(tmp_path / "run", [4, "Infinity", "NaN"])
    assert compare([f"a={run}", "--metrics", "loss", "--window", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| loss | a | 4 | inf | nan |"


def test_a_figure_without_matplotlib_is_refused(compare, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert compare([f"a={write(tmp_path / 'run', [4])}", "--plot", "figure.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_figure_is_written(compare, tmp_path):
    pytest.importorskip("matplotlib")
    one = write(tmp_path / "one", [4, 2, 1])
    assert compare([f"a={one}", "--metrics", "loss,round", "--plot", str(tmp_path / "new" / "figure.png")]) == 0
    assert (tmp_path / "new" / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["one"], "NAME=FILE"),
        (["a=missing"], "NAME=FILE"),
        (["a={one}"], "no step logged reward"),
        (["a={one}", "a={one}"], "another run of the name a"),
        (["a={one}", "--window", "0"], "--window 0"),
        (["a={torn}"], "a line that is not whole"),
    ],
)
def test_mistakes_are_told_in_a_line(compare, tmp_path, capsys, flags, said):
    places = {"one": write(tmp_path / "one", [4]), "torn": str(tmp_path / "torn")}
    (tmp_path / "torn").write_text('{"iteration": 1, "re')
    assert compare([*(flag.format(**places) for flag in flags), "--metrics", "reward"]) == 2
    assert said in capsys.readouterr().err
