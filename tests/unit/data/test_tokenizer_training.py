import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.tiny_tokenizers import LINES
from transformers import AutoTokenizer

from megatron_brain.commands import train_tokenizer
from megatron_brain.data.tokenizer import build_tokenizer
from megatron_brain.data.tokenizer.export import AWKWARD_TEXTS
from megatron_brain.data.tokenizer.training import Lines, TokenizerTraining, corpus_lines, measure, train
from megatron_brain.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def tool():
    return train_tokenizer


@pytest.fixture
def corpus(tmp_path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"{line}    number {1000 + i}\n" for i in range(30) for line in LINES))
    return str(path)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_tool_writes_a_lossless_tokenizer_that_both_classes_and_transformers_read_alike(
    tool, corpus, tmp_path, capsys, model_type
):
    folder = tmp_path / "made"
    flags = ["--vocab-size", "390", "--model-type", model_type, "--user-defined-symbols", "<think>", "</think>"]
    assert tool.main(["--input", corpus, "--save", str(folder), *flags]) == 0
    printed = capsys.readouterr().out
    assert "390 pieces from 150 lines" in printed and "3 held-out lines" in printed
    sp, hf = (build_tokenizer(kind, folder) for kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer"))
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "adds_bos"):
        assert getattr(sp, name) == getattr(hf, name)
    assert (sp.vocab_size, sp.sp.unk_id(), sp.bos_id, sp.eos_id, sp.pad_id) == (390, 0, 1, 2, 3)
    texts = [*AWKWARD_TEXTS, "<think>fine</think> <think>", "</s> <pad>"]
    assert sp.encode_prompts(texts) == hf.encode_prompts(texts)
    assert [sp.decode(ids) for ids in sp.encode_responses(texts)] == [t.replace("\u2581", " ") for t in texts]
    assert sp.sp.unk_id() not in {i for ids in sp.encode_prompts(texts) for i in ids}
    assert AutoTokenizer.from_pretrained(folder)("<think>")["input_ids"] == [1, sp.sp.piece_to_id("<think>")]
    assert len(sp.encode("1001")) == 4 > len(sp.encode("    "))


def test_a_text_has_the_same_tokens_alone_and_behind_another(corpus):
    model = train(TokenizerTraining(vocab_size=420), Lines(inputs=[corpus]))
    path = Path(corpus).with_name("tokenizer.model")
    path.write_bytes(model)
    sp = build_tokenizer("SentencePieceTokenizer", path)
    assert sp.decode(sp.encode("a short") + sp.encode(" summary")) == "a short summary"
    assert sp.decode(sp.encode("no") + sp.encode("space")) == "nospace"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_corpus_that_spells_special_pieces_teaches_none_of_them(tool, tmp_path, model_type):
    """Pieces such as "</s" and ">" are learned; together they are still text, here and in transformers."""
    text = "a </s> b <s>c <0x41> <pad> d"
    (tmp_path / "a.txt").write_text("\n".join([text, text, *LINES] * 20))
    settings = TokenizerTraining(vocab_size={"bpe": 400, "unigram": 375}[model_type], model_type=model_type)
    tool.run(settings, [str(tmp_path / "a.txt")], tmp_path / "x")
    sp, hf = (build_tokenizer(kind, tmp_path / "x") for kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer"))
    ids = sp.encode(text)
    assert hf.encode(text) == ids and hf.decode(ids) == text
    assert min(ids) >= 260 and len(ids) < len(text)


def test_records_give_every_text_field_and_message_by_line(tmp_path):
    records = [
        {"id": "x1", "prompt": "one\n\ntwo\r\n", "completion": " three"},
        {"prompt": [{"role": "user", "content": "four"}], "chosen": "five", "rejected": None, "score": 2},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "six"}, {"type": "image"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "seven"}]}]},
        {"text": "eight\u2028nine"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    Dataset.from_list([{"text": "from a folder"}]).save_to_disk(tmp_path / "saved")
    Dataset.from_list([{"text": "from parquet"}]).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("plain\n\n text \n")
    inputs = [str(tmp_path / "*.jsonl"), str(tmp_path / "b.parquet"), str(tmp_path / "saved"), str(tmp_path / "c.t*")]
    wanted = ["one", "two", " three", "four", "five", "six", "eight\u2028nine", "from parquet", "from a folder"]
    assert list(corpus_lines(inputs)) == [*wanted, "plain", " text "]


def test_the_corpus_is_streamed_and_the_held_out_lines_are_not_trained_on(corpus):
    lines = Lines(inputs=[corpus])
    stream = iter(lines)
    next(stream)
    assert lines.read == 1
    trained_on = [*stream]
    assert 1 + len(trained_on) == 147 and len(lines.held_out) == 3 and not set(lines.held_out) & set(trained_on)


def test_statistics_are_those_counted_by_hand(corpus):
    path = Path(corpus).with_name("tokenizer.model")
    path.write_bytes(train(TokenizerTraining(vocab_size=420), Lines(inputs=[corpus])))
    sp = build_tokenizer("SentencePieceTokenizer", path)
    lines = ["again and again", "\u2603"]
    count = len(sp.encode(lines[0])) + 3
    found = measure(sp, lines)
    assert found.bytes_per_token == pytest.approx((15 + 3) / count)
    assert found.tokens_per_word == pytest.approx(count / 4)
    assert found.byte_tokens == pytest.approx(3 / count)


def test_lines_of_any_length_are_trained_on(tmp_path):
    (tmp_path / "long.txt").write_text("wonderful " * 2000)
    (tmp_path / "short.txt").write_text("a b c d\n" * 5)
    inputs = [str(tmp_path / "long.txt"), str(tmp_path / "short.txt")]
    model = train(TokenizerTraining(vocab_size=375), Lines(inputs=inputs))
    assert b"wonderful" in model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", "90000"], r"--vocab-size 90000: the corpus has text for \d+ pieces at most"),
        (["--vocab-size", "100"], r"--vocab-size 100: must be above \d+"),
        (["--vocab-size", "420", "--user-defined-symbols", "a b"], "'a b': must not be empty or hold white space"),
        (["--vocab-size", "420", "--character-coverage", "2"], "--character-coverage 2.0: must be"),
        (["--vocab-size", "420", "--user-defined-symbols", "</s>"], "</s>: is always one token"),
        (["--vocab-size", "420", "--user-defined-symbols", "1"], "1: is always one token"),
    ],
)
def test_mistakes_in_the_settings_name_flag_and_cure(tool, corpus, tmp_path, capsys, flags, message):
    assert tool.main(["--input", corpus, "--save", str(tmp_path / "made"), *flags]) == 2
    assert re.match(f"error: .*{message}", capsys.readouterr().err)
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe\n", r"a.txt:2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"id": 3}\n', r"a.jsonl:2: no text; a record needs one of text, .* has id"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a.jsonl:2: not valid JSON"),
        ("a.txt", b"\n \n", r"a.txt: no text in it"),
    ],
)
def test_mistakes_in_the_corpus_reach_the_user_with_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        train(TokenizerTraining(vocab_size=420), Lines(inputs=[str(tmp_path / name)]))


def test_a_missing_file_and_a_folder_that_exists_or_cannot_be_made_are_errors(tool, corpus, tmp_path, capsys):
    with pytest.raises(ConfigError, match="no such file"):
        train(TokenizerTraining(vocab_size=420), Lines(inputs=[str(tmp_path / "none" / "x.jsonl")]))
    assert tool.main(["--input", corpus, "--vocab-size", "420", "--save", str(tmp_path)]) == 2
    assert f"--save {tmp_path} exists: give another folder, or remove it" in capsys.readouterr().err
    assert tool.main(["--input", corpus, "--vocab-size", "420", "--save", f"{corpus}/made"]) == 2
    assert f"--save {corpus}/made: {corpus} is a file, and should be a folder" in capsys.readouterr().err
