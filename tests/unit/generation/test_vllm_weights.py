"""What can go wrong when vLLM servers are opened or given weights: each failure is named with its cure."""

import errno
import os
import threading

import pytest
from helpers.stub_models import NumberModel
from helpers.vllm_runs import PROMPTS, SAMPLING, SEEDS, expected, sample, wait_until, within

from megatron_brain.errors import AgreedError


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


def test_a_server_that_restarts_while_it_is_given_weights_is_given_them_again(start, connect):
    server = start()
    engine = connect(server)
    server.kinds = {"restart_at_resume": True}
    engine.take_weights([1.0], "step 0")
    assert server.model.value == 1.0
    assert sample(engine) == expected(1.0)


@pytest.mark.parametrize("labels", [True, False])
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
