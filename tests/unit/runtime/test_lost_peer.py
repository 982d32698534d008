"""Failed communication is explained; other errors are left alone."""

import datetime
import socket

import pytest
import torch.distributed as dist

from megatron_brain.runtime.lost_peer import LostPeerError, explained


def test_an_error_of_torch_distributed_is_explained_and_kept_as_the_cause():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    with pytest.raises(LostPeerError) as caught, explained(timeout_minutes=3):
        dist.TCPStore("127.0.0.1", closed, timeout=datetime.timedelta(milliseconds=100))
    assert isinstance(caught.value.__cause__, dist.DistError)
    assert "--distributed-timeout-minutes 3" in str(caught.value) and "--auto-resume" in str(caught.value)


def test_a_plain_error_of_gloo_is_explained():
    with pytest.raises(LostPeerError), explained(timeout_minutes=3):
        raise RuntimeError(
            "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:1"
        )


def test_other_runtime_errors_pass_unchanged():
    error = RuntimeError("the tensor has a wrong shape")
    with pytest.raises(RuntimeError) as caught, explained(timeout_minutes=3):
        raise error
    assert caught.value is error
