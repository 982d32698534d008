"""Rows in exactly the form of trl-lib/tldr, trl-lib/tldr-preference and Anthropic/hh-rlhf, for every stage."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.reading import reading_settings

from megatron_brain.config.data import DataConfig
from megatron_brain.config.loader import load_config
from megatron_brain.config.stage_spec import PROMPTS, TRAIN_DATA, VALID_DATA
from megatron_brain.data.checking import check
from megatron_brain.data.corpus import read_corpus
from megatron_brain.data.prepared.preparation import Preparation, prepare
from megatron_brain.data.records import PreferenceReader, PromptReader, SFTReader
from megatron_brain.errors import RecordError

LIMITS = DataConfig(seq_length=512)
POST = "SUBREDDIT: r/relationships\n\nTITLE: The fox and the dog\n\nPOST: The dog is lazy.\n\nTL;DR:"
TLDR = [{"prompt": POST, "completion": " a lazy dog"}, {"prompt": POST.replace("fox", "cat"), "completion": " a cat"}]
TLDR_PREFERENCE = [{"prompt": POST, "chosen": " a lazy dog", "rejected": " a fox"}]

FIRST = "\n\nHuman: what is a fox?\n\nAssistant:"
LATER = f"{FIRST} An animal.\n\nHuman: and a dog?\n\nAssistant:"
HH_RLHF = [
    {"chosen": f"{FIRST} An animal.", "rejected": f"{FIRST} No idea"},
    {"chosen": f"{LATER} Another animal.\n\nIt barks.", "rejected": f"{LATER} An animal?"},
]
USABLE = [*HH_RLHF, {"chosen": f"{FIRST} Same.", "rejected": f"{FIRST} Same."}]
APART, WITHOUT = "the two dialogues do not part in their last answer", "a dialogue ends without an answer"
ODD = {
    "the last turn of one is empty": ({"chosen": f"{FIRST} An animal.", "rejected": FIRST}, WITHOUT),
    "the chosen one is blank": ({"chosen": f"{FIRST} ", "rejected": f"{FIRST} No"}, WITHOUT),
    "both are the same and have no answer": ({"chosen": FIRST, "rejected": FIRST}, WITHOUT),
    "they part in an earlier answer": (
        {"chosen": f"{LATER} Yes", "rejected": f"{LATER} Yes".replace("An animal", "None")},
        APART,
    ),
    "they part in an earlier question": ({"chosen": f"{LATER} Yes", "rejected": f"{FIRST} An animal."}, APART),
    "they part in the first question": (
        {"chosen": f"{FIRST} Yes", "rejected": f"{FIRST} Yes".replace("fox", "cat")},
        APART,
    ),
    "the user has the last word": ({"chosen": f"{FIRST} Yes\n\nHuman: thanks", "rejected": f"{FIRST} No"}, APART),
}


def as_jsonl(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_gzip(rows, path):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def as_parquet(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(params=[("train.jsonl", as_jsonl), ("train.jsonl.gz", as_gzip), ("train-00000.parquet", as_parquet)])
def written(request, tmp_path):
    """Writes rows in a kind of file that these data sets come in, and returns its name."""
    name, write = request.param

    def source(rows):
        write(rows, tmp_path / name)
        return str(tmp_path / name)

    return source


@pytest.fixture
def reading(hf_dir):
    return reading_settings(
        stage="reward", tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf_dir, limits=LIMITS
    )


def texts(groups, tokenizer):
    """Prompt and responses of groups as texts, without BOS and EOS."""
    return [
        (tokenizer.decode(group.prompt), *(tokenizer.decode_response(response) for response in group.responses))
        for group in groups
    ]


def test_tldr_is_learned_and_answered(written, hf):
    source = written(TLDR)
    expected = [(row["prompt"], row["completion"]) for row in TLDR]
    assert texts(read_corpus(source, SFTReader(hf, LIMITS)).items, hf) == expected
    prompts = read_corpus(source, PromptReader(hf, LIMITS, room=8)).items
    assert [(prompt.text, prompt.reference) for prompt in prompts] == expected
    with pytest.raises(RecordError, match="field 'chosen' is missing; the record has prompt, completion"):
        read_corpus(source, PreferenceReader(hf, LIMITS))


def test_tldr_preference_is_for_every_stage(written, hf):
    source = written(TLDR_PREFERENCE)
    [pair] = read_corpus(source, PreferenceReader(hf, LIMITS)).items
    assert texts([pair.group], hf) == [(POST, " a lazy dog", " a fox")]
    assert texts(read_corpus(source, SFTReader(hf, LIMITS)).items, hf) == [(POST, " a lazy dog")]
    [prompt] = read_corpus(source, PromptReader(hf, LIMITS, room=8)).items
    assert (prompt.text, prompt.reference) == (POST, " a lazy dog")


def test_of_hh_rlhf_the_shared_beginning_is_the_prompt_in_every_stage(written, hf):
    source = written(HH_RLHF)
    expected = [
        (FIRST, " An animal.", " No idea"),
        (LATER, " Another animal.\n\nIt barks.", " An animal?"),
    ]
    pairs = read_corpus(source, PreferenceReader(hf, LIMITS)).items
    assert texts([pair.group for pair in pairs], hf) == expected
    learned = read_corpus(source, SFTReader(hf, LIMITS)).items
    assert texts(learned, hf) == [row[:2] for row in expected]
    prompts = read_corpus(source, PromptReader(hf, LIMITS, room=8)).items
    assert [(prompt.text, prompt.reference) for prompt in prompts] == [row[:2] for row in expected]
    assert [p.tokens for p in prompts] == [g.prompt for g in learned] == [p.group.prompt for p in pairs]


@pytest.mark.parametrize("reader", [SFTReader, PreferenceReader, PromptReader])
def test_odd_rows_are_left_out_counted_and_named_by_every_stage(reader, written, hf, caplog):
    odd = [row for row, _ in ODD.values()]
    source = written([*USABLE, *odd])
    corpus = read_corpus(source, reader(hf, LIMITS))
    assert len(corpus.items) == len(USABLE)
    assert f"{len(USABLE) + len(odd)} records read, {len(USABLE)} kept, {len(odd)} dropped dialogues" in corpus.summary
    named = [record.getMessage() for record in caplog.records]
    first = f"{source}[3]" if "parquet" in source else f"{source}:4"
    assert named[0] == f"{first} is left out: {WITHOUT}"
    assert len(named) == 6 and named[5] == f"{len(odd)} dialogues are left out; tools/check_data.py names all"
    if reader is PreferenceReader:
        assert "1 identical pairs" in corpus.summary


@pytest.mark.parametrize("name", ODD)
def test_check_data_names_each_odd_row_with_its_reason(name, reading, tmp_path):
    row, reason = ODD[name]
    as_jsonl([*USABLE, row], tmp_path / "a.jsonl")
    report = check([str(tmp_path / "a.jsonl")], [], reading)
    [problem] = report.shown[False, "dialogue left out"]
    assert (problem.where, problem.message) == (f"{tmp_path}/a.jsonl:4", reason)
    assert report.total(errors=True) == 0
    assert report.reports[str(tmp_path / "a.jsonl")].dropped_dialogues == 1


def test_prepared_data_leave_out_and_count_the_same_rows(reading, tmp_path):
    rows = [ODD["the chosen one is blank"][0], *USABLE, ODD["the user has the last word"][0]]
    as_jsonl(rows, tmp_path / "a.jsonl")
    job = Preparation(
        input=str(tmp_path / "a.jsonl"), split=None, prefix=str(tmp_path / "p"), format="arrow", reading=reading
    )
    info = prepare(job)
    assert (info.counts["read"], info.counts["kept"], info.counts["dropped_dialogues"]) == (5, 3, 2)
    reader = reading.build()
    raw, prepared = (read_corpus(str(tmp_path / name), reader) for name in ("a.jsonl", "p"))
    assert raw.contents == prepared.contents
    assert len(read_corpus(str(tmp_path / "p"), reader, limit=2).items) == 1, "the first row is left out"


HUB = {"trl-lib/tldr": TLDR, "trl-lib/tldr-preference": TLDR_PREFERENCE, "Anthropic/hh-rlhf": HH_RLHF}
SPLITS = {"trl-lib/tldr": ("train", "validation", "test"), "Anthropic/hh-rlhf": ("train", "test")}


@pytest.mark.parametrize("name", HUB)
def test_the_hub_name_alone_chooses_the_split_of_each_use(name, hf, monkeypatch, caplog):
    """hh-rlhf has no split named validation."""
    caplog.set_level("INFO")
    splits = SPLITS.get(name, ("train", "validation"))
    loaded = datasets.DatasetDict({split: datasets.Dataset.from_list(HUB[name]) for split in splits})
    monkeypatch.setattr(datasets, "load_dataset", {name: loaded}.__getitem__)
    training = load_config("sft", ["--load", "c", "--train-data", name, "--valid-data", name])
    answering = load_config("generate", ["--load", "c", "--prompts", name, "--output", "o.jsonl"])
    for source, config, expected in [
        (TRAIN_DATA, training, "train"),
        (VALID_DATA, training, splits[1]),
        (PROMPTS, answering, splits[1]),
    ]:
        split, _ = source.chosen(config)
        reader = SFTReader(hf, LIMITS)
        assert read_corpus(name, reader, split=split).items[0].record_id == f"{name}[{expected}][0]"
    assert ("it has no split validation; test is read" in caplog.text) == (name == "Anthropic/hh-rlhf")
