from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_brain.data.lengths import ReadReport, fit_group, make_report
from megatron_brain.errors import ConfigError, RecordError

BOS, EOS = 1, 2


def limits(seq_length=10, max_prompt_length=None, max_response_length=None, overlong="error"):
    return SimpleNamespace(
        seq_length=seq_length,
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
        overlong=overlong,
    )


def fit(prompt, responses, rule, counts=None):
    counts = Counter() if counts is None else counts
    return fit_group(tuple(prompt), responses, bos_id=BOS, limits=rule, where="d.jsonl:3", counts=counts)


def ids(n, first=10):
    return tuple(range(first, first + n))


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_a_record_of_exactly_the_limits_is_left_alone(overlong):
    counts = Counter()
    rule = limits(10, max_prompt_length=6, max_response_length=4, overlong=overlong)
    assert fit(ids(6), [ids(4)], rule, counts) == (ids(6), (ids(4),))
    assert not +counts


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (limits(9), r"prompt 6 \+ response 4 tokens \(--seq-length 9\)"),
        (limits(99, max_prompt_length=5), r"prompt of 6 tokens \(--max-prompt-length 5\)"),
        (limits(99, max_response_length=3), r"response of 4 tokens with EOS \(--max-response-length 3\)"),
    ],
)
def test_overlong_error_names_record_lengths_limit_and_cure(rule, message):
    with pytest.raises(RecordError, match=rf"d.jsonl:3: too long: {message}; .*--overlong truncate"):
        fit(ids(6), [ids(4)], rule)


def test_drop_counts_and_returns_nothing():
    counts = Counter()
    assert fit(ids(6), [ids(4)], limits(9, overlong="drop"), counts) is None
    assert counts == {"dropped_overlong": 1}


def test_truncation_keeps_bos_and_the_end_of_the_prompt():
    counts = Counter()
    prompt, responses = fit((BOS, *ids(8)), [ids(4)], limits(10, overlong="truncate"), counts)
    assert prompt == (BOS, *ids(8)[-5:])
    assert responses == (ids(4),)
    assert +counts == {"truncated_prompt": 1}


def test_truncation_of_a_response_drops_its_end_and_adds_no_eos():
    counts = Counter()
    response = (*ids(8), EOS)
    prompt, responses = fit(ids(3), [response], limits(10, overlong="truncate"), counts)
    assert prompt == ids(3)
    assert responses == (response[:7],)
    assert +counts == {"truncated_response": 1}


def test_a_pair_shares_one_cut_prompt_and_the_longer_response_decides():
    prompt, responses = fit(ids(9), [ids(4), ids(2)], limits(10, overlong="truncate"))
    assert prompt == ids(9)[-6:]
    assert responses == (ids(4), ids(2))


@given(
    prompt=st.integers(1, 40),
    responses=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seq_length=st.integers(2, 40),
    max_prompt=st.none() | st.integers(1, 39),
    max_response=st.none() | st.integers(1, 39),
)
def test_truncated_records_fit_and_keep_a_suffix_and_nonempty_prefixes(
    prompt, responses, seq_length, max_prompt, max_response
):
    before = [ids(n, first=100) for n in responses]
    rule = limits(seq_length, max_prompt, max_response, overlong="truncate")
    kept_prompt, after = fit(ids(prompt), before, rule)
    assert 1 <= len(kept_prompt) <= (max_prompt or prompt)
    assert len(kept_prompt) + max(map(len, after)) <= seq_length
    assert ids(prompt)[-len(kept_prompt) :] == kept_prompt
    for old, new in zip(before, after, strict=True):
        assert 1 <= len(new) <= (max_response or len(old)) and old[: len(new)] == new
    full = len(kept_prompt) + max(map(len, after))
    if max_prompt is None and max_response is None and prompt + max(responses) >= seq_length:
        assert full == seq_length  # nothing is cut that had room


def test_report_reads_as_a_line_and_as_metrics():
    report = ReadReport(read=25000, kept=24990, dropped_overlong=10, duplicates=3)
    assert str(report) == "25,000 records read, 24,990 kept, 10 dropped overlong, 3 duplicates"
    assert report.as_dict()["dropped_overlong"] == 10 and report.as_dict()["truncated_prompt"] == 0


def test_nothing_left_is_an_error():
    with pytest.raises(ConfigError, match="no record left .*5 dropped overlong.*--seq-length 10"):
        make_report(Counter(read=5, dropped_overlong=5), 0, limits(10))


@pytest.mark.parametrize("dropped", [("overlong",), ("unlearned",), ("dialogues",), ("overlong", "dialogues")])
def test_the_cure_where_nothing_is_left_is_that_of_what_was_dropped(dropped):
    with pytest.raises(ConfigError) as caught:
        make_report(Counter({"read": 9, **{f"dropped_{name}": 3 for name in dropped}}), 0, limits(10))
    assert ("length limits" in str(caught.value)) == (dropped != ("dialogues",))
    assert ("agree up to their last answer" in str(caught.value)) == ("dialogues" in dropped)
