"""Debian package lists to packages: parsing, filters, splits."""

from collections import Counter

import pytest
from helpers.debian_tldr import origin_stanza, package, stanza, words


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
    with pytest.raises(example.user_errors.UserError, match="max_description_words = 10"):
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
