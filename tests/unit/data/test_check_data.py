"""Checking a data set: every problem once, with its place, and errors are exactly what stops a stage."""

import json

import pytest
from helpers.reading import reading_settings
from helpers.tiny_tokenizers import CHATML_MARKED, write_hf_tokenizer

from megatron_brain.commands import check_data
from megatron_brain.config.data import DataConfig
from megatron_brain.data import checking
from megatron_brain.data.checking import check
from megatron_brain.data.records import read_records
from megatron_brain.data.sources import parse_record, raw_records
from megatron_brain.errors import UserError

USER = {"role": "user", "content": "hello"}
GOOD = {"role": "assistant", "content": "a short summary"}
FINE = {"prompt": "hello\nTL;DR:", "completion": " fast"}
LINES = {
    FINE["prompt"]: (FINE, None),
    "cut": ('{"prompt": "p", ', "invalid JSON"),
    "half a surrogate": (r'{"prompt": "\ud800", "completion": " c"}', "not UTF-8"),
    "list": (["p"], "no JSON object"),
    "missing": ({"prompt": "p", "text": "t"}, "missing field"),
    "null": ({"prompt": None, "completion": " c"}, "missing field"),
    "empty": ({"prompt": " ", "completion": " c"}, "empty field"),
    "number": ({"prompt": "p", "completion": 3}, "wrong type"),
    "mixed": ({"prompt": "p", "completion": [GOOD]}, "wrong type"),
    "user last": ({"messages": [USER]}, "bad messages"),
    "no role": ({"messages": [{"content": "x"}]}, "bad messages"),
    "overlong": ({"prompt": "x" * 88, "completion": "é "}, "overlong"),
    "repeated": (FINE, "duplicate"),
    "control": ({"prompt": "a\x07 ", "completion": "c"}, "control character"),
    "replaced": ({"prompt": "a ", "completion": "\ufffd"}, "replacement character"),
    "mojibake": ({"prompt": "cafÃ© ", "completion": "c"}, "wrong encoding"),
    "mojibake of a sign": ({"prompt": "Â£5 ", "completion": "c"}, "wrong encoding"),
    "mojibake of quotes": ({"prompt": "a ", "completion": "itâ€™s"}, "wrong encoding"),
    "special": ({"prompt": "a <|im_end|> ", "completion": "c"}, "special token"),
    "no space": ({"prompt": "a TL;DR:", "completion": "c"}, "no space between prompt and response"),
    "chinese": ({"prompt": "你好", "completion": "世界"}, None),
    "chat": ({"messages": [USER, GOOD]}, "mixed formats"),
}
WARNINGS = {
    *("duplicate", "control character", "replacement character", "wrong encoding", "special token", "mixed formats"),
    "no space between prompt and response",
}


def settings(tokenizer, stage="sft", place=None, **options):
    limits = {name: options.pop(name) for name in ("seq_length", "overlong") if name in options}
    return reading_settings(
        stage=stage,
        tokenizer_type=tokenizer.tokenizer_type,
        tokenizer_model=place or tokenizer.hf.name_or_path,
        limits=DataConfig(**{"seq_length": 80, **limits}),
        **options,
    )


def write(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def broken(tmp_path):
    return write(tmp_path / "broken.jsonl", [record for record, _ in LINES.values()])


def problems(report):
    """(kind, line, is an error) of what is shown of records."""
    shown = (problem for of_kind in report.shown.values() for problem in of_kind if ":" in problem.where)
    return {(problem.kind, int(problem.where.rpartition(":")[2]), problem.is_error) for problem in shown}


@pytest.mark.parametrize("chunk", [3, 2000])
def test_every_problem_is_reported_at_its_line(chunk, broken, hf, monkeypatch):
    monkeypatch.setattr(checking, "_CHUNK", chunk)
    report = check([broken], [], settings(hf))
    expected = [kind for _, kind in LINES.values()]
    assert problems(report) == {
        (kind, line, kind not in WARNINGS) for line, kind in enumerate(expected, start=1) if kind is not None
    }
    assert f"{broken}:13: repeats {broken}:1" in str(report)
    assert "prompt 88 + response 4 tokens (--seq-length 80)" in str(report)


def test_errors_are_exactly_the_records_that_stop_a_stage(broken, hf):
    reading = settings(hf)
    reader = reading.build()
    stopping = set()
    for line, (where, raw) in enumerate(raw_records(broken), start=1):
        try:
            read_records(reader, [(where, parse_record(where, raw))])
        except UserError as error:
            assert str(error).startswith(f"{broken}:{line}: ")
            stopping.add(line)
    report = check([broken], [], reading, max_shown=100)
    assert {line for _, line, is_error in problems(report) if is_error} == stopping
    assert report.total(errors=True) == len(stopping)
    kept = report.reports[broken]
    assert (kept.read, kept.kept, kept.duplicates) == (len(LINES), len(LINES) - len(stopping), 1)


@pytest.mark.parametrize(("overlong", "kept"), [("drop", 0), ("truncate", 1)])
def test_overlong_records_that_are_dropped_or_cut_are_warnings_with_their_lengths(overlong, kept, hf, tmp_path):
    path = write(tmp_path / "long.jsonl", [LINES["overlong"][0], FINE])
    report = check([path], [], settings(hf, overlong=overlong))
    assert report.total(errors=True) == 0
    assert f"{path}:1: prompt 88 + response 4 tokens (--seq-length 80)" in str(report)
    assert report.reports[path].kept == 1 + kept


def test_pairs_that_teach_nothing_or_contradict_each_other_are_found(hf, tmp_path):
    pair = {"prompt": "p ", "chosen": "yes", "rejected": "no"}
    opposite = {"prompt": "p ", "chosen": "no", "rejected": "yes"}
    same = {"prompt": "q ", "chosen": "no", "rejected": "no"}
    path = write(tmp_path / "pairs.jsonl", [pair, same, opposite, pair])
    report = check([path], [], settings(hf, "reward"))
    assert problems(report) == {("identical pair", 2, False), ("contradiction", 3, False), ("duplicate", 4, False)}
    assert f"prefers the opposite of {path}:1" in str(report)


def test_validation_records_that_are_trained_on_are_found(hf, tmp_path):
    train = write(tmp_path / "train.jsonl", [FINE, {"prompt": "other ", "completion": "c"}])
    valid = write(tmp_path / "valid.jsonl", [{"prompt": "new ", "completion": "c"}, FINE, {**FINE, "completion": " x"}])
    said = str(check([train], [valid], settings(hf)))
    assert f"{valid}:2: the same record is trained on: {train}:1" in said
    assert f"{valid}:3: a record with the same prompt is trained on: {train}:1" in said
    assert "0 errors, 2 warnings" in said


def test_a_template_that_cannot_mark_turns_is_an_error_of_every_conversation(hf, hf_marked, tmp_path):
    path = write(tmp_path / "chats.jsonl", [{"messages": [USER, GOOD] * 2}, {"messages": [USER, GOOD] * 3}])
    short_marks = write_hf_tokenizer(
        tmp_path / "short",
        eos_token="<|im_end|>",
        chat_template=CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
    )
    report = check([path], [], settings(hf, multi_turn_loss=True, place=short_marks))
    assert {("unmarked assistant turns", line, True) for line in (1, 2)} <= problems(report)
    assert not problems(check([path], [], settings(hf_marked, multi_turn_loss=True)))
    assert not problems(check([path], [], settings(hf, multi_turn_loss=True)))


def test_characters_the_vocabulary_lacks_and_empty_responses_are_told(sp, sp_file, tmp_path):
    invisible = next(c for c in "\u200b\ufeff\x7f" if sp.encode(c) == [])
    path = write(
        tmp_path / "d.jsonl", [{"prompt": "日本語", "completion": "fast"}, {"prompt": "a", "completion": invisible}]
    )
    report = check([path], [], settings(sp, place=sp_file))
    assert {("byte fallback", 1, False), ("empty response", 2, True)} <= problems(report)
    assert "no space" not in str(report), "this tokenizer puts one there itself"


def test_a_source_that_cannot_be_read_is_an_error_and_the_others_are_checked(broken, hf, tmp_path):
    (tmp_path / "damaged.parquet").write_text("no parquet")
    report = check([str(tmp_path / "damaged.parquet"), broken], [], settings(hf))
    assert "damaged.parquet: cannot be read as parquet" in str(report) and report.counts[True, "not UTF-8"] == 1


def test_contents_that_are_no_text_are_errors_of_their_record(hf, tmp_path):
    contents = [5, {"text": "a"}, ["a"], [{"type": "image"}], "fine"]
    records = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]} for c in contents]
    records[-1]["tools"] = 5
    path = write(tmp_path / "d.jsonl", records)
    found = problems(check([path], [], settings(hf)))
    assert {found for found in found if found[0] == "bad messages"} == {("bad messages", n, True) for n in range(1, 4)}
    assert ("unsupported field", 4, True) in found
    assert ("bad tools", 5, True) in found


def test_exit_statuses_tell_errors_warnings_and_mistakes_apart(hf_dir, tmp_path, capsys):
    fine = write(tmp_path / "fine.jsonl", [FINE])
    warned = write(tmp_path / "warned.jsonl", [FINE] * 4)
    wrong = write(tmp_path / "wrong.jsonl", [FINE, *["{"] * 5])
    flags = ["--stage", "sft", "--hf-model", hf_dir, "--workers", "1"]
    assert check_data.main([*flags, "--input", fine, "--strict"]) == 0
    assert check_data.main([*flags, "--input", warned]) == 0
    assert check_data.main([*flags, "--input", warned, "--strict"]) == 1
    capsys.readouterr()
    assert check_data.main([*flags, "--input", wrong, "--max-shown", "2"]) == 1
    said = capsys.readouterr().out
    assert "error: invalid JSON: 5\n" in said and said.count("wrong.jsonl:") == 3 and "and 3 more" in said
    assert check_data.main([*flags, "--input", fine, "--seq-length", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
    assert check_data.main([*flags, "--input", fine, str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_what_truncation_leaves_nothing_of_and_turns_inside_of_an_answer_are_warnings(hf_marked, tmp_path):
    user, long = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox " * 60, "weight": 0}
    unlearned = {"messages": [user, long, user, {"role": "assistant", "content": "fine"}]}
    path = write(tmp_path / "a.jsonl", [unlearned, FINE])
    reading = settings(hf_marked, overlong="truncate", multi_turn_loss=True)
    report = check([path], [], reading)
    assert ("nothing learned, dropped", 1, False) in problems(report)
    early = [f"\n\nHuman: hello\n\nAssistant:{said}\n\nHuman: sure?\n\nAssistant: yes" for said in (" so", " no")]
    path = write(tmp_path / "b.jsonl", [{"prompt": "what?", "chosen": early[0], "rejected": early[1]}])
    assert ("turns in an answer", 1, False) in problems(check([path], [], settings(hf_marked, "reward")))
