"""Failures of vLLM servers in a round: each is named in time, or mended with the same samples."""

import os
import signal
import threading
import time

import pytest
from helpers.vllm_runs import PROMPTS, SAMPLING, SEEDS, SHORT, expected, meanwhile, sample, wait_until, within

from megatron_brain.errors import AgreedError
from megatron_brain.generation.engine import Interrupted
from megatron_brain.runtime import signals


def test_a_server_that_is_not_there_is_named_in_time(start, connect):
    here, gone = start(), start()
    gone.kill()
    with within(12), pytest.raises(AgreedError, match=f"{gone.url}.*ConnectError.*--engine-url.*--engine-timeout 2 s"):
        connect(here, gone, **SHORT)


def test_a_server_that_starts_late_is_waited_for(start, connect):
    server = start()
    server.kill()

    def later():
        time.sleep(0.5)
        server.start_again()

    with meanwhile(later):
        engine = connect(server)
    engine.take_weights([1.0], "step 0")
    assert sample(engine) == expected(1.0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_is_killed_in_a_round_and_started_again_gives_the_same_samples(start, connect, count):
    servers = [start() for _ in range(count)]
    engine = connect(*servers)
    engine.take_weights([1.0], "step 0")
    servers[0].kinds = {"slow": 0.02}

    def restart():
        wait_until(lambda: servers[0].answered > 4)
        servers[0].kill()
        time.sleep(0.3)
        servers[0].kinds = {}
        servers[0].start_again()

    with meanwhile(restart):
        assert sample(engine) == expected(1.0)
    # Another server may have drawn the round alone, before this one was there again.
    for _ in range(50):
        assert sample(engine) == expected(1.0)
        if servers[0].model.value == 1.0:
            break
    assert servers[0].model.value == 1.0


def test_a_restart_that_no_request_noticed_is_seen_at_the_end_of_the_round(start, connect):
    server = start()
    engine = connect(server)
    engine.take_weights([1.0], "step 0")
    drawn = server.answered
    server.kinds = {"restart_after": drawn + 10}
    assert sample(engine) == expected(1.0)
    # Drawn were the first few with the given weights, the rest without them, and then all again.
    assert len(server.seen) > 10 + sum(map(len, SEEDS))


def test_what_a_restarted_server_answers_until_it_is_given_the_weights_again_is_drawn_again(start, connect):
    server = start()
    engine = connect(server)
    engine.take_weights([1.0], "step 0")
    server.kinds = {"slow": 0.3, "slow_pause": 1.0}

    def restart():
        wait_until(lambda: server.answered > 4)
        server.begin_anew()
        server.kinds["fail_once"] = True

    with meanwhile(restart):
        assert sample(engine) == expected(1.0)


def test_a_server_that_stays_away_leaves_the_round_to_the_others(start, connect):
    servers = [start(), start()]
    engine = connect(*servers)
    engine.take_weights([1.0], "step 0")
    servers[1].kinds = {"slow": 0.02}

    def kill():
        wait_until(lambda: servers[1].answered > 4)
        servers[1].kill()

    with meanwhile(kill):
        assert sample(engine) == expected(1.0)


def test_a_server_that_restarts_again_and_again_stops_the_run(start, connect):
    server = start()
    engine = connect(server)
    engine.take_weights([1.0], "step 0")

    def restart_often():
        for given in range(1, 5):
            wait_until(lambda given=given: server.calls.count("/resume") == given)
            enough = server.answered + 6  # Of these, some prove the weights.
            wait_until(lambda enough=enough: server.answered > enough)
            server.begin_anew()

    server.kinds = {"slow": 0.02}
    with (
        meanwhile(restart_often),
        pytest.raises(AgreedError, match=f"{server.url}: has restarted 4 times in one round"),
    ):
        sample(engine)


@pytest.mark.parametrize(
    ("kind", "said"),
    [({"hang": True}, "no answer to /v1/completions within 0.5 s"), ({"status": 500}, "500 it was told to")],
)
def test_servers_that_fail_for_longer_than_the_limit_are_named_with_what_they_said(start, connect, kind, said):
    servers = [start(), start()]
    engine = connect(*servers, **SHORT)
    engine.take_weights([1.0], "step 0")
    for server in servers:
        server.kinds = kind
    with within(12), pytest.raises(AgreedError) as raised:
        sample(engine)
    assert all(f"{server.url} said: " in str(raised.value) for server in servers)
    assert said in str(raised.value)
    assert "--engine-timeout 2 s" in str(raised.value)


@pytest.mark.parametrize("kind", [{"hang": True}, {"status": 500}, {"status": 429}])
def test_a_server_that_fails_for_a_while_gives_the_same_samples(start, connect, kind):
    server = start()
    engine = connect(server, engine_request_timeout=0.4)
    engine.take_weights([1.0], "step 0")

    def mend():
        wait_until(lambda: len(server.seen) > 6)
        server.kinds = kind
        time.sleep(0.6)
        server.kinds = {}

    server.kinds = {"slow": 0.01}
    with meanwhile(mend):
        assert sample(engine) == expected(1.0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"fewer": True}, "ended a response after 1 of 12 tokens without EOS .*--max-model-len"),
        ({"shift": 400}, "the run's vocabulary has 320 tokens.*another model or tokenizer"),
        ({"other_prompt": True}, "answered the prompt .*and was asked .*another tokenizer"),
        ({"status": 400}, "/v1/completions: 400 it was told to"),
        ({"status": 401}, "without --api-key"),
    ],
)
def test_an_answer_to_another_question_stops_the_run_at_once(start, connect, kind, said):
    server = start()
    engine = connect(server)
    engine.take_weights([1.0], "step 0")
    answered = len(server.seen)

    def misbehave():
        wait_until(lambda: len(server.seen) > answered + 1)
        server.kinds = kind

    with meanwhile(misbehave), within(12), pytest.raises(AgreedError, match=f"{server.url}.*{said}"):
        for _ in range(3):
            sample(engine)


def test_a_stop_signal_ends_the_wait_for_responses(start, connect):
    server = start()
    engine = connect(server, engine_request_timeout=30.0, engine_timeout=30.0)
    engine.take_weights([1.0], "step 0")
    server.kinds = {"hang": True}
    with signals.noted():
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        with within(12), pytest.raises(Interrupted, match=r"SIGTERM \(rank 0\) while the vLLM servers drew responses"):
            sample(engine)
    server.kinds = {}
    assert sample(engine) == expected(1.0)


def test_a_stop_signal_does_not_end_the_wait_for_a_round_that_is_drawn_ahead(start, connect):
    server = start()
    engine = connect(server)
    engine.take_weights([1.0], "step 0")
    server.kinds = {"slow": 0.05}
    with signals.noted():
        pending = engine.begin(PROMPTS, seeds=SEEDS, sampling=SAMPLING)
        os.kill(os.getpid(), signal.SIGTERM)
        found = pending.result()
    assert [[completion.tokens for completion in of_prompt] for of_prompt in found] == expected(1.0)
    assert pending.seconds > 0.1
