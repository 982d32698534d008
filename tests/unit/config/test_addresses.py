"""Addresses that no request can be sent to are refused when settings are read."""

import pytest

from megatron_brain.config.addresses import require_address
from megatron_brain.config.engine import EngineConfig
from megatron_brain.config.judging import JudgingConfig
from megatron_brain.config.rewards import reward_parts
from megatron_brain.errors import ConfigError

WRONG = [
    "host:8000/v1",
    "http://localhost:abc/v1",
    "http://[::1/v1",
    "http://[v1.a]/v1",
    "http://localhost:99999/v1",
    "http://localhost:0/v1",
    "http://256.1.1.1/v1",
    "http://:8000/v1",
    "http:///v1",
    "http://a..b/v1",
    f"http://{'a' * 64}/v1",
    "http://my host/v1",
    "http://host\n/v1",
    "http://☃.org/v1",
]


@pytest.mark.parametrize("url", WRONG)
def test_every_flag_of_an_address_refuses_one_that_no_request_can_be_sent_to(url):
    for key, make in {
        "judge_url": lambda: JudgingConfig(judge_url=url, judge_model="m"),
        "reward_url": lambda: reward_parts(None, None, url, None),
        "engine_url": lambda: EngineConfig(engine="vllm", engine_url=url, engine_sync_dir="s"),
    }.items():
        with pytest.raises(ConfigError, match=rf"{key}=.*(?s:.)*: is no address; write http://host:port"):
            make()


@pytest.mark.parametrize(
    "url",
    ["http://[::1]:80/v1", "https://api.example.org/v1", "http://localhost.:8000", "http://10.0.0.1", "http://a_b"],
)
def test_names_and_both_kinds_of_ip_addresses_are_taken(url):
    require_address("key", url, example="")
