"""The stub of a vLLM server answers as a real one: the same statuses, and JSON of the same shape. It runs if
VLLM_PYTHON is set, as test_runs_elsewhere.py says."""

import pytest
from helpers.assets import write_assets
from helpers.elsewhere import needs
from helpers.stub_models import PolicyOfFolder
from helpers.stub_vllm import StubServer
from helpers.vllm_runs import export, tiny_policy
from helpers.vllm_servers import served

httpx2 = pytest.importorskip("httpx2")

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_query_groups": 2, "kv_channels": 64}
ASK = {"prompt": [5, 17, 99], "max_tokens": 4, "temperature": 0.7, "seed": 2**63 - 1, "logprobs": 0, "n": 1}
ASK |= {"ignore_eos": True, "stop_token_ids": [7], "return_token_ids": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
RPC = {"method": "reload_weights", "kwargs": {"weights_path": ""}}

REQUESTS = [
    ("GET", "/v1/models", None),
    ("GET", "/version", None),
    ("POST", "/v1/completions", ASK),
    ("POST", "/v1/completions", ASK | {"prompt_logprobs": 0, "temperature": 0.0, "max_tokens": 1}),
    ("POST", "/v1/completions", ASK | {"logprobs": 3, "return_tokens_as_token_ids": True, "max_tokens": 1}),
    ("POST", "/v1/completions", ASK | {"prompt": [5] * 200}),
    ("POST", "/v1/completions", ASK | {"prompt": [100_000]}),
    ("GET", "/weight_info", None),
    ("GET", "/is_paused", None),
    ("POST", "/pause?mode=abort", None),
    ("GET", "/is_paused", None),
    ("POST", "/collective_rpc", RPC),
    ("POST", "/reset_prefix_cache", None),
    ("POST", "/update_weight_version", {"new_version": "a run's"}),
    ("GET", "/weight_info", None),
    ("POST", "/resume", None),
    ("GET", "/is_paused", None),
    ("POST", "/no_such_path", None),
]


def shape(value):
    """The keys and types of a JSON value. An integer may stand for a float, and lists of any length are alike."""
    if isinstance(value, dict):
        by_id = all(key.isdigit() for key in value)  # The log-probabilities of a prompt's tokens.
        return {"an id": shape(next(iter(value.values())))} if by_id else _shapes(value)
    if isinstance(value, list):
        return [shape(value[-1])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def _shapes(value):
    # The keys of `top_logprobs` are tokens, whose texts the stub does not know.
    return {
        key: shape([list(x.values()) for x in item] if key == "top_logprobs" else item) for key, item in value.items()
    }


def left_out(stub, real, where=""):
    """What of the stub's shape the real server's has not, in words. The real one says more."""
    if isinstance(stub, dict) and isinstance(real, dict):
        missing = [f"{where}.{key}" for key in stub if key not in real]
        return missing + [x for key in stub if key in real for x in left_out(stub[key], real[key], f"{where}.{key}")]
    if isinstance(stub, list) and isinstance(real, list) and stub and real:
        return left_out(stub[0], real[0], f"{where}[]")
    return [] if stub == real else [f"{where}: {stub} and {real}"]


@needs("VLLM_PYTHON")
def test_the_stub_answers_as_a_real_server(single, tmp_path):
    write_assets(tmp_path)
    folder = export(tiny_policy(single, **SIZES), tmp_path / "model", **SIZES)
    stub = StubServer(PolicyOfFolder(folder, single), folder, longest=128)
    RPC["kwargs"]["weights_path"] = str(folder)
    try:
        with served(folder, tmp_path, tokenizer=tmp_path / "tokenizer", longest=128) as url:
            for method, path, body in REQUESTS:
                told = [httpx2.request(method, base + path, json=body, timeout=300) for base in (stub.url, url)]
                assert told[0].status_code == told[1].status_code, (path, body, told[0].text, told[1].text)
                shapes = [shape(response.json()) for response in told]
                assert not left_out(*shapes), (path, body)
                if path == "/is_paused":
                    assert told[0].json() == told[1].json()
            assert "process_start_time_seconds " in httpx2.get(f"{url}/metrics").text
    finally:
        stub.close()
