"""vLLM servers at every layout: each replica gets its own responses, and all ranks end alike."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from distributed.world import Context, Layout, at

SEED = 5


def is_small(layout: Layout) -> bool:
    return not layout.sp and layout.layers_per_virtual_stage is None and layout.size <= 4


@contextlib.contextmanager
def world_with_server(layout: Layout, context: Context) -> Iterator[tuple]:
    """The layout, a server in the process of rank 0 (None elsewhere), and a function that opens an engine."""
    from helpers.stub_models import NumberModel
    from helpers.stub_vllm import StubServer
    from helpers.vllm_runs import open_number_engine

    from megatron_brain.config.parallel import ParallelConfig
    from megatron_brain.runtime import parallel as runtime

    config = ParallelConfig(tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp)
    parallel = runtime.start(config, seed=1)
    folder, server = context.shared / "vllm" / layout.name, None
    if parallel.rank == 0:
        NumberModel.write(-5.0, folder / "model")
        server = StubServer(NumberModel(), folder / "model")
    [url, *_] = parallel.gather_over_world(server.url if server else None)

    def write(chunks: list[float], place: Path) -> None:
        if parallel.rank == 0:
            NumberModel.write(chunks[0], place)

    def connect(**options: object):
        return open_number_engine([url], folder / "sync", parallel, **{"write": write} | options)

    try:
        yield parallel, server, connect
    finally:
        parallel.gather_over_world(None)
        if server is not None:
            server.close()
            shutil.rmtree(folder)


def asked(parallel) -> tuple[list, list]:
    """The prompts of this replica, and their seeds."""
    from megatron_brain.generation.seeds import sample_seeds

    keys = range(3 * parallel.dp_rank, 3 * parallel.dp_rank + 3 + parallel.dp_rank)  # Replicas have other numbers.
    return [(5, 17, 20 + key) for key in keys], sample_seeds(SEED, keys, 4)


def drawn(engine, parallel) -> tuple[list, list]:
    """What the engine draws and what it should, as tokens."""
    from helpers.vllm_runs import numbers_responses

    from megatron_brain.config.stages import SamplingConfig

    sampling, (prompts, seeds) = SamplingConfig(max_new_tokens=12), asked(parallel)
    found = engine.sample(prompts, seeds=seeds, sampling=sampling)
    return [[c.tokens for c in row] for row in found], numbers_responses(1.0, prompts, seeds, sampling)


def error_of(action) -> str | None:
    """What an action fails with: its type and text."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def expect_same_error(action, parallel, text: str) -> None:
    errors = parallel.gather_over_world(error_of(action))
    assert len(set(errors)) == 1, errors
    assert text in str(errors[0]), errors


@at(is_small)
def case_every_replica_gets_its_own_responses_and_a_restart_is_mended_once(layout: Layout, context: Context) -> None:
    with world_with_server(layout, context) as (parallel, server, connect):
        engine = connect()
        engine.take_weights([1.0], "step 0")
        found, expected = drawn(engine, parallel)
        assert found == expected
        if server is not None:
            server.kinds = {"restart_after": server.answered + 6}
        found, expected = drawn(engine, parallel)
        assert found == expected
        # All replicas have seen the restart when each has drawn once more.
        found, expected = drawn(engine, parallel)
        assert found == expected
        if server is not None:
            assert server.calls.count("/collective_rpc") == 2


@at(is_small)
def case_all_ranks_end_alike(layout: Layout, context: Context) -> None:
    from megatron_brain.runtime import signals

    def fails_on_last(chunks: list[float], place: Path) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(28, "No space left on device", str(place / "x"))

    with world_with_server(layout, context) as (parallel, server, connect):
        engine = connect(write=fails_on_last)
        expect_same_error(lambda: engine.take_weights([1.0], "step 0"), parallel, "No space left on device")
        engine = connect()
        engine.take_weights([1.0], "step 0")
        if server is not None:
            server.kinds = {"fewer": True}
        parallel.gather_over_world(None)
        expect_same_error(lambda: drawn(engine, parallel), parallel, "AgreedError")
        if server is not None:
            server.kinds = {"hang": True}
        parallel.gather_over_world(None)
        with signals.noted():
            if parallel.rank == parallel.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            start = time.monotonic()
            expect_same_error(
                lambda: drawn(engine, parallel), parallel, f"Interrupted: SIGTERM (rank {parallel.world_size - 1})"
            )
            assert time.monotonic() - start < 5
