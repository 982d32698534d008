"""Fixtures every test may use."""

import hypothesis
import pytest

# How long an example takes says something of the machine's other work alone.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def single():
    """The layout of one process, its groups made once for the session."""
    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.runtime import parallel

    yield parallel.start(ParallelConfig(), seed=1)
    parallel.stop()
