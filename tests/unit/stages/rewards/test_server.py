"""Reward servers over real sockets: what is sent, what comes back, what is tried again and what is told."""

import importlib.util
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.stub_json import StubJson

from megatron_brain.config.rewards import reward_parts
from megatron_brain.config.stages import ScoringConfig
from megatron_brain.errors import ConfigError
from megatron_brain.stages.rewards.answers import Answer
from megatron_brain.stages.rewards.server import RewardServer

EXAMPLES = Path(__file__).parents[4] / "examples"
ANSWERS = [
    Answer(prompt=f"p{i}", response="y" * i, record={"id": f"d:{i}", "n": i}, record_id=f"d:{i}", tokens=(7, i))
    for i in range(1, 6)
]


def scorer(url, *, timeout=5.0, batch=2, concurrency=8):
    settings = ScoringConfig(reward_timeout=timeout, reward_batch_size=batch, reward_concurrency=concurrency)
    [part] = reward_parts(None, None, url, None)
    return RewardServer(part, settings, SimpleNamespace(encode=lambda text: [ord(letter) for letter in text]))


def lengths(number, request):
    return 200, {"rewards": [len(text) for text in request["responses"]]}


def refused(url, **settings):
    with pytest.raises(ConfigError) as caught:
        scorer(url, **settings)(ANSWERS)
    return str(caught.value)


def test_the_form_is_the_documented_one_and_answers_come_back_in_order_however_late():
    def slow_first(number, request):
        time.sleep(0.05 * (request["records"][0]["n"] == 1))
        return lengths(number, request)

    with StubJson(slow_first) as stub:
        assert scorer(f"{stub.url}/any?x=1")(ANSWERS) == [1.0, 2.0, 3.0, 4.0, 5.0]
    sent = sorted(stub.requests, key=lambda request: request[1]["records"][0]["n"])
    assert sent[0] == (
        "/any?x=1",
        {"prompts": ["p1", "p2"], "responses": ["y", "yy"], "records": [{"id": "d:1", "n": 1}, {"id": "d:2", "n": 2}]},
    )
    assert [len(request["responses"]) for _, request in sent] == [2, 2, 1]


def test_no_more_requests_are_under_way_than_allowed():
    def slow(number, request):
        time.sleep(0.02)
        return lengths(number, request)

    with StubJson(slow) as stub:
        scorer(stub.url, batch=1, concurrency=2)(ANSWERS)
    assert stub.most == 2 and len(stub.requests) == 5


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_may_pass_is_tried_again(status):
    with StubJson(lambda number, request: (status, "busy") if number == 0 else lengths(number, request)) as stub:
        assert scorer(stub.url, batch=9)(ANSWERS) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(stub.requests) == 2


def test_a_server_that_stays_broken_is_told_with_its_last_answer_and_the_records():
    with StubJson(lambda number, request: (503, "loading the model")) as stub:
        message = refused(stub.url, timeout=0.5, batch=3)
    assert "no rewards within --reward-timeout 0.5 seconds for 2 of 2 requests" in message
    assert "the 3 responses to d:1 to d:3: status 503: loading the model" in message


def test_a_server_that_is_not_there_or_does_not_answer_ends_in_the_set_time():
    with StubJson(lambda number, request: time.sleep(1.5) or lengths(number, request)) as stub:
        start = time.monotonic()
        assert "d:1 to d:5: no answer yet" in refused(stub.url, timeout=0.3, batch=9)
        assert time.monotonic() - start < 1
    assert "ConnectError" in refused(stub.url, timeout=1.5)


def test_a_mistake_is_told_at_once_with_the_body_of_the_answer():
    with StubJson(lambda number, request: (422, '{"detail": "no field prompts"}')) as stub:
        message = refused(stub.url, batch=9)
    assert f'--reward-url {stub.url} answered with status 422 to the 5 responses to d:1 to d:5: {{"detail"' in message
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1, 2]}, "gave 2 rewards for the 5 responses to d:1 to d:5; it must give one for each"),
        ({"rewards": [1, 2, "3", 4, 5]}, "gave '3' for the response to d:3; it must be a finite number"),
        ({"rewards": [1, 2, 3, None, 5]}, "gave None for the response to d:4"),
        ({"rewards": [True, 2, 3, 4, 5]}, "gave True for the response to d:1"),
        ('{"rewards": [1, 2, 3, 4, NaN]}', "gave nan for the response to d:5"),
        ({"scores": [1]}, r'the answer must be {"rewards": [...]}'),
        ("<html>", r"""with '<html>': the answer"""),
    ],
)
def test_anything_but_a_number_for_each_response_is_an_error_that_names_the_record(answer, message):
    with StubJson(lambda number, request: (200, answer)) as stub:
        assert message in refused(stub.url, batch=9)


def classified(request, *outputs):
    if "tokens" in request:
        return 200, {"prompt": "".join(map(chr, request["tokens"])).replace(" ", "  ")}
    data = [{"index": i, "probs": list(outputs), "label": None} for i in range(len(request["input"]))]
    return 200, {
        "data": [{**item, "probs": [ids[1] * x for x in item["probs"]]} for item, ids in zip(data, request["input"])][
            ::-1
        ]
    }


def test_vllm_gets_token_ids_and_its_one_output_before_the_activation_is_the_reward():
    with StubJson(lambda number, request: classified(request, 0.5)) as stub:
        assert scorer(f"{stub.url}/classify")(ANSWERS) == [0.5, 1.0, 1.5, 2.0, 2.5]
    (first, _), *others = stub.requests
    assert first == "/detokenize"
    path, request = min(others, key=lambda sent: sent[1]["input"])
    assert path == "/classify" and request == {"input": [[7, 1], [7, 2]], "use_activation": False}


@pytest.mark.parametrize(
    "answer", [(200, {"prompt": "another text"}), (400, "ids out of range"), (404, "no such path")]
)
def test_a_served_model_with_another_tokenizer_is_refused(answer):
    with StubJson(lambda number, request: answer if "tokens" in request else classified(request, 0.5)) as stub:
        message = refused(f"{stub.url}/classify")
    assert "/detokenize makes " in message and "must have the tokenizer of the run" in message
    assert [path for path, _ in stub.requests] == ["/detokenize"]


def test_of_several_outputs_the_address_says_which_one_is_the_reward():
    with StubJson(lambda number, request: classified(request, 0.5, -1.0)) as stub:
        assert scorer(f"{stub.url}/classify#1")(ANSWERS) == [-1.0, -2.0, -3.0, -4.0, -5.0]
        assert "several outputs for a response; put #INDEX" in refused(f"{stub.url}/classify")
        assert "fewer than 3 outputs" in refused(f"{stub.url}/classify#2")
    for wrong in ("/classify#x", "/rewards#1"):
        with pytest.raises(ConfigError, match="must be the index of an output, behind an address of /classify"):
            scorer(stub.url + wrong)


def test_the_example_server_speaks_the_form_and_shows_the_error_of_its_function():
    spec = importlib.util.spec_from_file_location("reward_server", EXAMPLES / "reward_server.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def rule(prompts, responses, records):
        return [record["n"] / len(text) for text, record in zip(responses, records, strict=True)]

    with example.make_server(rule, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert scorer(url)(ANSWERS) == [1.0] * 5
        empty = Answer(prompt="p", response="", record={"id": "d:0", "n": 1}, record_id="d:0", tokens=(7,))
        with pytest.raises(ConfigError, match="status 400 to the response to d:0(.|\n)*ZeroDivisionError"):
            scorer(url)([empty])
        server.shutdown()
