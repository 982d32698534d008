"""Fixtures of the tests with servers whose model is a number."""

import contextlib

import pytest
from helpers.stub_models import NumberModel
from helpers.stub_vllm import StubServer
from helpers.vllm_runs import open_number_engine


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
