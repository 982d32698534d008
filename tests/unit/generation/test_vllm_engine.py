"""The vLLM engine against a server that speaks vLLM's HTTP and draws with our own sampler."""

from itertools import chain

import pytest
from helpers.stub_models import PolicyOfFolder
from helpers.stub_vllm import StubServer
from helpers.vllm_runs import EOS, export, open_engine, tiny_policy

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.generation.native import NativeEngine
from megatron_brain.generation.seeds import sample_seeds

PROMPTS = [(5, 17, 99), (250, 3, 3, 8, 41, 77, 12), (9,), (5, 17, 99, 4)]
SAMPLING = SamplingConfig(max_new_tokens=12)
SEEDS = sample_seeds(3, range(len(PROMPTS)), 3)


@pytest.fixture(scope="module")
def policies(single):
    return [tiny_policy(single, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def servers(single, policies, tmp_path_factory):
    folder = export(policies[2], tmp_path_factory.mktemp("model"))
    servers = [StubServer(PolicyOfFolder(folder, single), folder) for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def fresh(servers):
    for server in servers:
        server.kinds = {}
        server.begin_anew()
        server.seen.clear()
        server.calls.clear()
    return servers


def native(single, policy, sampling=SAMPLING):
    engine = NativeEngine(single, eos_id=EOS)
    engine.take_weights([policy], "the same")
    return engine.sample(PROMPTS, seeds=SEEDS, sampling=sampling)


def tokens(results):
    return [[sample.tokens for sample in samples] for samples in results]


def test_responses_are_those_of_the_native_engine_before_and_after_new_weights(single, policies, fresh, tmp_path):
    engine = open_engine([server.url for server in fresh], tmp_path, single)
    for policy, label in zip(policies, ("step 0", "step 1", "step 2"), strict=True):
        engine.take_weights([policy], label)
        assert engine.holds == label
        found, expected = engine.sample(PROMPTS, seeds=SEEDS, sampling=SAMPLING), native(single, policy)
        assert tokens(found) == tokens(expected)
        for mine, theirs in zip(chain(*found), chain(*expected), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert mine.finished == theirs.finished
    assert all(len(server.seen) > 3 for server in fresh)
