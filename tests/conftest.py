"""Fixtures every test may use."""

import pytest


@pytest.fixture(scope="session")
def single():
    """The layout of one process, its groups made once for the session."""
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.runtime import parallel

    yield parallel.start(ParallelConfig(), seed=1)
    parallel.stop()
