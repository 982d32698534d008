"""Comparisons by a judge over real sockets: what is asked, counted, kept, tried again and told."""

import json
import re
import threading
import time
from email.utils import formatdate

import pytest
from helpers.stub_json import StubJson, chat_judge

from megatron_brain.config.judging import JudgingConfig
from megatron_brain.errors import ConfigError
from megatron_brain.stages.judging.comparison import compare_answers
from megatron_brain.stages.judging.judge import LanguageModelJudge
from megatron_brain.stages.judging.summary import count_verdicts, summarize_verdicts
from megatron_brain.stages.judging.verdicts import VerdictFile

TEMPLATE = "{{ prompt }}|{{ answer_a }}|{{ answer_b }}"
PAIR, OTHER_PAIR = "llm/policy_vs_baseline", "llm/policy_vs_reference"


def rows():
    """Three prompts: the policy is longer than the baseline on the first, shorter on the second, equal on the third."""
    return [
        {"id": "d:1", "prompt": "p1", "policy": "long one", "baseline": "short", "reference": None},
        {"id": "d:2", "prompt": "p2", "policy": "s", "baseline": "longer", "reference": None},
        {"id": "d:3", "prompt": "p3", "policy": "same", "baseline": "same", "reference": None},
    ]


def longer(message):
    """The verdict of a judge who likes long answers, from a message of TEMPLATE."""
    _, a, b = message.split("|")
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


@pytest.fixture
def make(tmp_path):
    """Makes a judge of an address and settings. All have one file of verdicts."""
    (tmp_path / "t.jinja").write_text(TEMPLATE)

    def judge(url, environment=None, **settings):
        given = {"judge_template": str(tmp_path / "t.jinja"), "judge_model": "m", "judge_timeout": 20.0} | settings
        config = JudgingConfig(judge_url=url, **given)
        return LanguageModelJudge(config, VerdictFile(tmp_path / "verdicts.jsonl"), environment or {})

    return judge


def compared(judge, given=None, max_verdicts=100):
    given = rows() if given is None else given
    compare_answers(judge, given, max_verdicts=max_verdicts)
    return given


def values(given):
    """The values of metrics. Each row counts three times, so that hardly any resampling has equal texts alone."""
    return {name: e.value for name, e in summarize_verdicts([*given] * 3, bootstrap_samples=50, seed=0).items()}


def refused(judge, **more):
    with pytest.raises(ConfigError) as caught:
        compared(judge, **more)
    return str(caught.value)


def test_both_orders_are_asked_at_temperature_0_and_equal_texts_tie_without_a_call(make):
    with StubJson(chat_judge(longer)) as stub:
        found = compared(make(f"{stub.url}/v1", judge_max_tokens=7))
    assert {path for path, _ in stub.requests} == {"/v1/chat/completions"}
    messages = sorted(request["messages"][0]["content"] for _, request in stub.requests)
    assert messages == ["p1|long one|short", "p1|short|long one", "p2|longer|s", "p2|s|longer"]
    for _, request in stub.requests:
        message = request.pop("messages")
        assert [part["role"] for part in message] == ["user"]
        assert request == {"model": "m", "temperature": 0, "max_tokens": 7}
    assert [row[PAIR] for row in found] == [
        {"winner": "policy", "verdicts": ["A", "B"]},
        {"winner": "baseline", "verdicts": ["B", "A"]},
        {"winner": "tie", "verdicts": []},
    ]
    assert values(found) == {
        "win_rate/llm/policy_vs_baseline": 0.5,
        "llm/ties/policy_vs_baseline": pytest.approx(1 / 3),
        "llm/position_bias/policy_vs_baseline": 0.5,
        "llm/unparsable/policy_vs_baseline": 0.0,
    }


def test_a_judge_who_always_takes_the_first_gives_only_ties_and_a_position_bias_of_1(make):
    with StubJson(chat_judge(lambda message: "A")) as stub:
        found = compared(make(stub.url))
    assert [row[PAIR]["winner"] for row in found] == ["tie"] * 3
    assert values(found) == {
        "win_rate/llm/policy_vs_baseline": 0.5,
        "llm/ties/policy_vs_baseline": 1.0,
        "llm/position_bias/policy_vs_baseline": 1.0,
        "llm/unparsable/policy_vs_baseline": 0.0,
    }
    assert count_verdicts(found)["policy_vs_baseline"]["orders_disagree"] == 2


def test_the_reference_is_compared_with_where_there_is_one(make):
    given = rows()
    given[1]["reference"] = ""
    with StubJson(chat_judge(longer)) as stub:
        compared(make(stub.url), given)
    assert [row[OTHER_PAIR]["winner"] for row in given if OTHER_PAIR in row] == ["policy"]
    assert count_verdicts(given)["policy_vs_reference"]["prompts"] == 1
    assert values(given)["win_rate/llm/policy_vs_reference"] == 1.0


def test_an_unparsable_verdict_is_counted_and_no_tie(make):
    with StubJson(chat_judge(lambda message: "Well..." if message.endswith("|s") else longer(message))) as stub:
        found = compared(make(stub.url))
    assert found[1][PAIR] == {"winner": None, "verdicts": ["B", None]}
    assert values(found)["win_rate/llm/policy_vs_baseline"] == 0.75, "of the first and the third prompt"
    assert values(found)["llm/unparsable/policy_vs_baseline"] == 0.25
    counts = count_verdicts(found)["policy_vs_baseline"]
    assert counts == {
        "prompts": 3,
        "compared": 3,
        "equal_texts": 1,
        "orders_disagree": 0,
        "undecided": 1,
        "unparsable_verdicts": 1,
    }


def test_a_refusal_without_text_is_unparsable(make):
    with StubJson(chat_judge(lambda message: None)) as stub:
        found = compared(make(stub.url))
    assert [row[PAIR]["winner"] for row in found] == [None, None, "tie"]


def test_verdicts_are_used_again_without_a_call_unless_what_they_depend_on_changed(make, tmp_path):
    with StubJson(chat_judge(longer)) as stub:
        first = compared(make(stub.url))
        assert len(stub.requests) == 4
        assert compared(make(f"{stub.url}/v1")) == first, "this is the same endpoint"
        assert compared(make(stub.url)) == first
        assert len(stub.requests) == 4
        compared(make(f"{stub.url}/of/another/server"))
        assert len(stub.requests) == 8
        (tmp_path / "other.jinja").write_text(f"?{TEMPLATE}")
        other_template = {"judge_template": str(tmp_path / "other.jinja")}
        for change in ({"judge_model": "other"}, {"judge_max_tokens": 99}, other_template):
            before = len(stub.requests)
            compared(make(stub.url, **change))
            assert len(stub.requests) == before + 4, change
        for field in ("prompt", "policy", "baseline"):
            given, before = rows(), len(stub.requests)
            given[0][field] += "!"
            compared(make(stub.url), given)
            assert len(stub.requests) == before + 2, field
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"key", "verdict", "model", "id", "order", "reply"}
    assert {line["order"] for line in lines} == {"policy, baseline", "baseline, policy"}


def test_an_interrupted_comparison_goes_on_from_the_verdicts_it_has(make):
    def breaks(number, request):
        return (400, "out of credit") if number == 2 else chat_judge(longer)(number, request)

    with StubJson(breaks) as stub:
        message = refused(make(stub.url, judge_concurrency=1))
        assert "status 400 on d:2: out of credit" in message
        compared(make(stub.url, judge_concurrency=1))
    assert len(stub.requests) == 3 + 2


def test_the_cap_compares_the_first_prompts_with_all_others_and_says_so(make, caplog):
    given = rows()
    for row in given:
        row["reference"] = "reference"
    with StubJson(chat_judge(longer)) as stub:
        compared(make(stub.url), given, max_verdicts=7)
        assert len(stub.requests) == 4
        assert "the judge compares the first 1 of 3 prompts" in caplog.text
        assert [(PAIR in row, OTHER_PAIR in row) for row in given] == [(True, True), (False, False), (False, False)]
        counts = count_verdicts(given)
        assert [(c["prompts"], c["compared"]) for c in counts.values()] == [(3, 1), (3, 1)]
        # What is known counts too, so the same command gives the same report.
        compared(make(stub.url), again := [dict(row, reference="reference") for row in rows()], max_verdicts=7)
        assert again == given and len(stub.requests) == 4
        assert "the first prompt needs 4 verdicts" in refused(make(stub.url), given=given, max_verdicts=3)


def test_no_more_requests_are_under_way_than_allowed(make):
    two = threading.Barrier(2)

    def slow(number, request):
        two.wait(timeout=20)
        time.sleep(0.03)  # A third one would come now.
        return chat_judge(longer)(number, request)

    with StubJson(slow) as stub:
        compared(make(stub.url, judge_concurrency=2))
    assert stub.most == 2 and len(stub.requests) == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again_and_not_before_the_server_wants_it(status, make):
    times = []

    def busy_once(number, request):
        times.append(time.monotonic())
        if number == 0:
            return status, "busy", {"retry-after": "1"}
        return chat_judge(longer)(number, request)

    with StubJson(busy_once) as stub:
        assert compared(make(stub.url, judge_concurrency=1))[0][PAIR]["winner"] == "policy"
    assert len(stub.requests) == 5
    assert times[1] - times[0] >= 1


def test_a_retry_after_may_be_a_date(make):
    times = []

    def busy_once(number, request):
        times.append(time.time())
        # Dates have whole seconds.
        when = formatdate(time.time() + 2, usegmt=True)
        return (429, "", {"retry-after": when}) if number == 0 else chat_judge(longer)(number, request)

    with StubJson(busy_once) as stub:
        compared(make(stub.url, judge_concurrency=1))
    assert len(stub.requests) == 5 and times[1] - times[0] >= 0.99


def test_the_time_limit_names_what_is_missing_and_what_was_kept(make, tmp_path):
    def stuck(number, request):
        return (503, "loading") if "p2" in request["messages"][0]["content"] else chat_judge(longer)(number, request)

    with StubJson(stuck) as stub:
        # With what is kept, no request but the stuck ones is under way, and a loaded machine cannot be too slow for it.
        compared(make(stub.url), rows()[:1])
        message = refused(make(stub.url, judge_timeout=1))
    assert "2 verdicts did not come within --judge-timeout 1 seconds, the first on d:2: " in message
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2


def test_the_first_problem_that_may_pass_is_told_at_once_and_the_last_one_when_time_is_over(make, caplog, monkeypatch):
    monkeypatch.setattr("megatron_brain.stages.posting._PAUSE", lambda state: 0.0)
    with StubJson(lambda number, request: (503, f"loading {number}") if number < 3 else (400, "enough")) as stub:
        refused(make(stub.url, judge_concurrency=1))
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"--judge-url {stub.url}: status 503: loading 0" in told
    judge = make(stub.url)
    judge._note("ConnectError nobody is there")
    assert judge._problem() == "ConnectError nobody is there"


def test_an_answer_that_cannot_be_decoded_is_asked_for_again(make):
    def garbled(number, request):
        return (200, "no gzip", {"content-encoding": "gzip"}) if number == 0 else chat_judge(longer)(number, request)

    with StubJson(garbled) as stub:
        compared(make(stub.url, judge_concurrency=1))
    assert len(stub.requests) == 5


def test_a_reply_with_half_of_a_surrogate_pair_has_its_verdict(make):
    with StubJson(chat_judge(lambda message: "A\n\ud83d")) as stub:
        assert compared(make(stub.url))[0][PAIR]["verdicts"] == ["A", "A"]
        compared(make(stub.url))
    assert len(stub.requests) == 4


def test_a_sample_shows_that_the_judge_answers_and_is_asked_once(make, caplog):
    with StubJson(chat_judge(lambda message: "A")) as stub:
        make(stub.url).require_answer()
        make(stub.url).require_answer()
        assert len(stub.requests) == 1 and "has no verdict" not in caplog.text
        compared(judge := make(stub.url), max_verdicts=4)
        assert len(stub.requests) == 5 and len(judge.file.known) == 5, "the sample does not count"
    with StubJson(chat_judge(lambda message: "Hm.")) as stub:
        make(stub.url).require_answer()
    assert "its reply on a sample has no verdict" in caplog.text


def test_a_judge_that_does_not_answer_is_told_before_anything_else(make, monkeypatch):
    with StubJson(lambda number, request: (401, "no")) as stub, pytest.raises(ConfigError, match="401 on a sample: no"):
        make(stub.url).require_answer()
    monkeypatch.setattr("megatron_brain.stages.judging.judge._ANSWER_SECONDS", 0.05)
    with pytest.raises(ConfigError, match=r"no verdict on a sample within 0.05 seconds.* does its server run\?"):
        make(stub.url).require_answer()


def test_a_file_of_verdicts_that_cannot_be_written_is_an_error_of_the_file_system(make, tmp_path):
    with StubJson(chat_judge(longer)) as stub:
        judge = make(stub.url)
        (tmp_path / "verdicts.jsonl").mkdir()
        with pytest.raises(IsADirectoryError):
            compared(judge)


def test_a_server_of_another_form_is_told(make):
    with StubJson(lambda number, request: (200, {"rewards": [1]})) as stub:
        assert "is no chat completion: give the base address" in refused(make(stub.url))


def test_the_key_goes_into_the_request_and_nowhere_else(make, tmp_path, caplog):
    key = "sk-verySecret123"
    caplog.set_level("DEBUG")

    def repeats(number, request):
        said = {"choices": [{"message": {"content": f"A, said {key}"}}]}
        return (503, f"busy, {key}") if number == 0 else (200, said) if number < 3 else (401, f"bad key {key}")

    with StubJson(repeats) as stub:
        message = refused(make(stub.url, {"OPENAI_API_KEY": f"{key}\n"}, judge_concurrency=1))
        compared(make(stub.url), [rows()[2]])
    assert [headers.get("authorization") or headers.get("Authorization") for headers in stub.headers] == [
        f"Bearer {key}"
    ] * 4
    assert "bad key ***" in message and "is OPENAI_API_KEY the key of this endpoint?" in message
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "said ***" in written
    for text in (written, message, caplog.text):
        assert key not in text
    with pytest.raises(ConfigError, match="holds characters that no key has") as caught:
        make(stub.url, {"OPENAI_API_KEY": f"{key}\nx"})
    assert key not in str(caught.value)


def test_without_a_key_none_is_sent(make):
    with StubJson(chat_judge(longer)) as stub:
        compared(make(stub.url))
    assert not [name for headers in stub.headers for name in headers if name.lower() == "authorization"]


@pytest.mark.parametrize(
    ("base", "path"),
    [("", "/v1"), ("/", "/v1"), ("/v1", "/v1"), ("/openai/v1/", "/openai/v1"), ("/v1/chat/completions", "/v1")],
)
def test_the_base_address_may_be_written_as_clients_and_servers_do(base, path, make):
    with StubJson(chat_judge(longer)) as stub:
        compared(make(stub.url + base))
    assert {asked for asked, _ in stub.requests} == {f"{path}/chat/completions"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_url": "host/v1", "judge_model": "m"}, "is no address"),
        ({"judge_url": "http://host/v1"}, "judge_model is not set"),
        ({"judge_url": "http://me:secret@host/v1", "judge_model": "m"}, "must hold no name, password or key"),
        ({"judge_url": "http://host/v1?key=secret", "judge_model": "m"}, "must hold no name, password or key"),
        ({"judge_cache": "v.jsonl"}, "judge_cache=v.jsonl: nothing reads it without --judge-url"),
        *(
            ({name: 7}, f"{name}=7: nothing reads it without --judge-url")
            for name in ("judge_max_tokens", "judge_max_verdicts", "judge_concurrency", "judge_timeout")
        ),
        ({"judge_max_verdicts": 0}, "judge_max_verdicts=0: must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_a_secret_in_the_message(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        JudgingConfig(**settings)
    assert "secret" not in str(caught.value)
