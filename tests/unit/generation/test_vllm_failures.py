"""Failures between a run and its vLLM servers: each is named in time, or mended with the same samples."""

import contextlib
import errno
import os
import signal
import threading
import time

import pytest
from helpers.stub_models import NumberModel
from helpers.stub_vllm import StubServer
from helpers.vllm_runs import numbers_responses, open_number_engine

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.errors import AgreedError
from megatron_brain.generation.engine import Interrupted
from megatron_brain.generation.seeds import sample_seeds
from megatron_brain.runtime import signals

PROMPTS = [(5, 17, 99), (250, 3, 3, 8, 41, 77, 12), (9, 8)]
SAMPLING = SamplingConfig(max_new_tokens=12)
SEEDS = sample_seeds(3, range(len(PROMPTS)), 8)
SHORT = {"engine_request_timeout": 0.5, "engine_timeout": 2.0}


@pytest.fixture
def start(tmp_path):
    """Starts a server whose model is a number that no run gives."""
    NumberModel.write(-5.0, tmp_path / "model")
    with contextlib.ExitStack() as stack:

        def start(**options):
            server = StubServer(NumberModel(), tmp_path / "model", **options)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def connect(single, tmp_path):
    def connect(*servers, name="sync", **changes):
        return open_number_engine([server.url for server in servers], tmp_path / name, single, **changes)

    return connect


def sample(engine):
    found = engine.sample(PROMPTS, seeds=SEEDS, sampling=SAMPLING)
    return [[completion.tokens for completion in of_prompt] for of_prompt in found]


def expected(value):
    return numbers_responses(value, PROMPTS, SEEDS, SAMPLING)


@contextlib.contextmanager
def within(seconds):
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


@contextlib.contextmanager
def meanwhile(action):
    """Do something in another thread."""
    thread = threading.Thread(target=action)
    thread.start()
    yield
    thread.join()


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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
    assert sample(engine) == expected(1.0)
    assert all(server.model.value == 1.0 for server in servers)


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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_refuses_the_weights_is_named_and_no_half_folder_stays(start, connect, tmp_path, code):
    server = start()

    def write(chunks, folder):
        (folder / "weight.json").write_text("{")
        raise OSError(code, os.strerror(code), str(folder / "weight.json"))

    engine = connect(server, write=write)
    with pytest.raises(AgreedError, match=f"sync/.*weight.json: {os.strerror(code)}: .*another"):
        engine.take_weights([1.0], "step 0")
    assert engine.holds is None
    [run] = (tmp_path / "sync").iterdir()
    assert not list(run.iterdir())
    assert not [call for call in server.calls if call.startswith("/collective_rpc")]


def test_servers_are_told_of_complete_folders_only(start, connect, tmp_path):
    server, seen = start(), []

    def write(chunks, folder):
        seen.append(folder)
        NumberModel.write(chunks[0], folder)

    engine = connect(server, write=write)
    for step in range(4):
        engine.take_weights([float(step)], f"step {step}")
    [run] = (tmp_path / "sync").iterdir()
    assert [folder.name for folder in seen] == [f"{number:05d}.partial" for number in (1, 2, 3, 4)]
    assert sorted(folder.name for folder in run.iterdir()) == ["00003", "00004"]


def test_a_folder_that_a_server_cannot_read_is_named(start, connect):
    server = start()
    engine = connect(server, write=lambda chunks, folder: (folder / "weight.json").write_text('{"val'))
    with within(12), pytest.raises(AgreedError, match=f"{server.url}: /collective_rpc: 500 .*could not read .*/00001"):
        engine.take_weights([1.0], "step 0")


def test_a_folder_that_the_server_sees_late_is_read_again(start, connect, tmp_path):
    server = start()

    def write(chunks, folder):
        """The disk is slow to show the file."""
        name = folder.name.removesuffix(".partial")
        threading.Timer(0.5, lambda: NumberModel.write(chunks[0], folder.with_name(name))).start()

    engine = connect(server, write=write)
    engine.take_weights([1.0], "step 0")
    assert server.model.value == 1.0


@pytest.mark.parametrize("labels", [True, False])
def test_a_server_that_restarts_while_it_is_given_weights_is_given_them_again(start, connect):
    server = start()
    engine = connect(server)
    server.kinds = {"restart_at_resume": True}
    engine.take_weights([1.0], "step 0")
    assert server.model.value == 1.0
    assert sample(engine) == expected(1.0)


def test_two_trainers_on_one_server_are_seen(start, connect, labels):
    server = start()
    server.kinds = {} if labels else {"no_labels": True}
    mine, other = connect(server), connect(server, name="other")
    mine.take_weights([1.0], "step 0")
    other.take_weights([2.0], "step 0")
    said = (
        r"holds the weights '.*\(step 0\)', and .* another trainer"
        if labels
        else "holds other weights than this run gave"
    )
    with pytest.raises(AgreedError, match=f"{server.url}: {said}.*Give each run servers of its own"):
        sample(mine)
    with pytest.raises(AgreedError, match="servers of its own"):
        mine.take_weights([3.0], "step 1")
    assert sample(other) == expected(2.0)


def test_another_trainer_in_the_middle_of_a_round_is_seen(start, connect):
    server = start()
    mine, other = connect(server), connect(server, name="other")
    mine.take_weights([1.0], "step 0")
    answered, server.kinds = len(server.seen), {"slow": 0.02}
    pending = mine.begin(PROMPTS, seeds=SEEDS, sampling=SAMPLING)
    wait_until(lambda: len(server.seen) > answered + 4)
    other.take_weights([2.0], "step 0")
    with pytest.raises(AgreedError, match=f"{server.url}: holds .*Give each run servers of its own"):
        pending.result()


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


def test_a_prefix_cache_that_is_not_reset_stops_the_run(start, connect):
    server = start()
    server.kinds = {"keep_reset": True}
    engine = connect(server)
    with within(12), pytest.raises(AgreedError, match=f"{server.url}: /reset_prefix_cache.*earlier weights"):
        engine.take_weights([1.0], "step 0")
    assert server.calls.count("/reset_prefix_cache") > 1


def test_a_server_that_keeps_its_weights_is_told_from_one_that_holds_others(start, connect):
    good, bad = start(), start()
    engine = connect(good, bad)
    bad.kinds = {"keep_weights": True}
    with pytest.raises(
        AgreedError, match=f"{bad.url}: holds other weights than it was given .*--max-engine-difference.*--untie"
    ):
        engine.take_weights([1.0], "step 0")
    bad.kinds = {}
    engine = connect(good, bad, name="again")
    engine.take_weights([1.0], "step 0")
    bad.kinds = {"keep_weights": True}
    with pytest.raises(AgreedError, match=rf"{bad.url}: still answers with the weights of before \(step 0\)"):
        engine.take_weights([2.0], "step 1")


def test_without_dev_mode_the_cure_is_told(start, connect):
    server = start(dev_mode=False)
    with pytest.raises(AgreedError, match=f"{server.url}/.*404.*VLLM_SERVER_DEV_MODE=1"):
        connect(server)


def test_a_server_that_takes_too_few_tokens_is_refused(start, connect):
    server = start(longest=30)
    with pytest.raises(AgreedError, match=f"{server.url}: takes 30 tokens.*--max-model-len 64"):
        connect(server)


def test_raw_logprobs_are_refused_where_they_are_to_make_weights(start, connect):
    server = start()
    engine = connect(server)
    engine.require_processed_logprobs()
    server.kinds = {"raw": True}
    with pytest.raises(AgreedError, match=f"{server.url}: .*--logprobs-mode processed_logprobs"):
        engine.require_processed_logprobs()


def test_a_server_that_was_left_paused_goes_on(start, connect):
    server = start()
    server.running.clear()
    engine = connect(server)
    engine.require_processed_logprobs()
