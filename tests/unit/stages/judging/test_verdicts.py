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


def test_a_line_that_was_cut_short_is_passed_over_and_told_and_stays(tmp_path, caplog):
    path = tmp_path / "v.jsonl"
    for cut in ('{"key": "tw', '{"k', '{"key": "two", "verdict": "A'):
        path.write_text(before := '{"key": "one", "verdict": "A"}\n' + cut)
        file = VerdictFile(path)
        assert file.known == {"one": "A"} and "v.jsonl:2: is not whole" in caplog.text
        file.add("two", "B")
        file.add("three", "A")
        assert VerdictFile(path).known == {"one": "A", "two": "B", "three": "A"}
        assert path.read_text().startswith(f"{before}\n")
        caplog.clear()


def test_a_last_verdict_without_its_newline_counts_and_stays(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"key": "one", "verdict": "A"}')
    file = VerdictFile(path)
    file.add("two", "B")
    assert file.known == VerdictFile(path).known == {"one": "A", "two": "B"}


def test_a_verdict_that_another_run_is_writing_is_never_cut(tmp_path):
    path = tmp_path / "v.jsonl"
    with path.open("a") as other:
        other.write('{"key": "one", ')
        other.flush()
        file = VerdictFile(path)
        other.write('"verdict": "A"}\n')
    file.add("two", "B")
    assert VerdictFile(path).known == {"one": "A", "two": "B"}


@pytest.mark.parametrize("text", ['{"all": "of my data"}', "some notes", "[1, 2]", "a,b\n1,2\n3,4"])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(text, tmp_path):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ConfigError, match="data.json:1: is no verdict"):
        VerdictFile(tmp_path / "data.json")
    assert (tmp_path / "data.json").read_text() == text


def test_a_reply_may_hold_half_of_a_surrogate_pair(tmp_path):
    VerdictFile(tmp_path / "v.jsonl").add("one", None, reply="\ud83d")
    assert VerdictFile(tmp_path / "v.jsonl").known == {"one": None}


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "no json", '{"key": "a", "verdict": "C"}', '{"key": ["a"], "verdict": "A"}', '{"key": "a"}']
)
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


@pytest.mark.parametrize(
    "wrong", ["{{ prompt.foo }}", "{% include 'a.jinja' %}", "{{ prompt / 2 }}", "{{ prompt.__class__.mro() }}"]
)
def test_a_template_that_fails_when_it_is_used_is_refused_before_anything_is_sampled(wrong, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ prompt }} {{ answer_a }} {{ answer_b }} " + wrong)
    with pytest.raises(ConfigError, match=r"t.jinja: cannot be rendered \("):
        JudgeTemplate(str(tmp_path / "t.jinja"))


def test_a_template_that_some_texts_break_names_itself(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ prompt }} {{ answer_a }} {{ answer_b }} {{ 1 // (prompt | length) }}")
    with pytest.raises(ConfigError, match=r"t.jinja: cannot be rendered \(ZeroDivisionError"):
        JudgeTemplate(str(tmp_path / "t.jinja")).message("", "a", "b")
