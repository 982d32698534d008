"""What a reply says, and the file of verdicts."""

import json

import pytest

from megatron_brain.errors import ConfigError
from megatron_brain.stages.judging.template import JudgeTemplate
from megatron_brain.stages.judging.verdicts import VerdictFile, parse_verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**Tie**", "tie"),
        ("Answer A", "A"),
        ("The better answer is B.", "B"),
        ("Verdict: tie", "tie"),
        ("Response B is better", "B"),
        ("A\n\nIt says what matters. B is longer.", "A"),
        ("<think>\nB looks good, but...\n</think>\n\nA", "A"),
        ("Both are fine, so [[C]]", "tie"),
        ("A is short, yet [[B]]", "B"),
    ],
)
def test_a_reply_with_one_verdict_is_read(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "A good answer would be shorter.",
        "I cannot judge this.",
        "A\nor else\nB",
        "[[A]] or [[B]]",
        "C",
        "AB",
        "Both",
    ],
)
def test_a_reply_without_a_verdict_or_with_two_is_never_a_tie(reply):
    assert parse_verdict(reply) is None


def test_verdicts_are_written_at_once_and_read_again(tmp_path):
    file = VerdictFile(tmp_path / "deep" / "v.jsonl")
    file.add("one", "A", id="d:1", reply="A\u2028é")
    file.add("two", None, id="d:2", reply="?")
    lines = (tmp_path / "deep" / "v.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0]) == {"key": "one", "verdict": "A", "id": "d:1", "reply": "A\u2028é"}
    assert VerdictFile(tmp_path / "deep" / "v.jsonl").known == {"one": "A", "two": None}


def test_a_line_that_was_cut_short_is_removed_and_told(tmp_path, caplog):
    path = tmp_path / "v.jsonl"
    path.write_text('{"key": "one", "verdict": "A"}\n{"key": "tw')
    file = VerdictFile(path)
    assert file.known == {"one": "A"} and "not whole" in caplog.text
    file.add("two", "B")
    assert VerdictFile(path).known == {"one": "A", "two": "B"}


@pytest.mark.parametrize("line", ["{}", "[1]", "no json", '{"key": "a", "verdict": "C"}'])
def test_a_line_that_is_no_verdict_is_named(line, tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text(f'{{"key": "one", "verdict": "A"}}\n{line}\n')
    with pytest.raises(ConfigError, match="v.jsonl:2: "):
        VerdictFile(path)


def test_the_template_of_the_package_holds_prompt_and_answers_as_they_are():
    message = JudgeTemplate(None).message("{{ 1 + 1 }} <b>", " first", "second\n")
    assert "\n{{ 1 + 1 }} <b>\n" in message and "\n first\n" in message and "\nsecond\n\n" in message
    assert message.index(" first") < message.index("second")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{{ prompt }} {{ answer_a }}", "wrong or missing: answer_b"),
        ("{{ prompt }} {{ answer_a }} {{ answer_b }} {{ reference }}", "wrong or missing: reference"),
        ("{{ prompt }", "t.jinja:1: is no Jinja template"),
    ],
)
def test_a_template_without_exactly_these_fields_is_refused(text, wrong, tmp_path):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ConfigError, match=wrong):
        JudgeTemplate(str(tmp_path / "t.jinja"))
    with pytest.raises(ConfigError, match="cannot be read"):
        JudgeTemplate(str(tmp_path / "none.jinja"))
