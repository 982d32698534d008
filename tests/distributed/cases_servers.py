"""Runs whose responses servers draw: the stub, which draws with our sampler, gives the run of the native engine."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from distributed.cases_ahead import STEPS, ahead_flags, engine, steps
from distributed.cases_brain import brain_flags
from distributed.cases_held_out import evaluated
from distributed.runs import expect_equal, flags_of, open_trainer
from distributed.world import Context, Layout, at

some = at(lambda layout: layout.name in ("tp2_sp", "pp2_interleaved", "dp2"))
_ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def servers(trainer, context: Context, count: int) -> Iterator[str]:
    """So many processes of the stub, started by rank 0 from an export of the trainer's policy. Gives --engine-url."""
    from megatron_brain.conversion.live import write_live

    folder = context.shared / "served"
    if context.world_size == 1:
        folder.mkdir(exist_ok=True)
        run = trainer.run
        write_live(trainer.gathered_chunks(), run.parallel, run.config.model, folder, tokenizer=run.tokenizer)
    processes, urls = [], []
    if torch.distributed.get_rank() == 0:
        # The launcher's variables would make the server a rank of this world.
        ours = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "tests")])
        for _ in range(count):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "helpers.stub_vllm", "--model", str(folder), "--port", str(port)]
            processes.append(subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, text=True))
            urls.append(f"http://127.0.0.1:{port}")
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        yield ",".join(trainer.parallel.gather_over_world(urls)[0])
    finally:
        for process in processes:
            process.kill()
            process.wait()


@some
def case_servers_give_the_trajectory_of_the_native_engine_bit_for_bit(layout: Layout, context: Context) -> None:
    flags = [*brain_flags(context), "--train-iters", str(STEPS), "--lr-decay-style", "constant"]
    flags += ["--valid-data", str(context.assets / "sft.jsonl"), "--max-valid-records", "3"]
    native = open_trainer("brain", flags_of("brain", layout, context, *flags))
    with servers(native, context, count=2) as url:
        expected = steps(native, STEPS)
        held_out = evaluated(native)
        folder = context.shared / f"sync_{context.world_size}_{layout.name}"
        asked = ["--engine", "vllm", "--engine-url", url, "--engine-sync-dir", str(folder)]
        served = open_trainer("brain", flags_of("brain", layout, context, *flags, *asked))
        assert steps(served, STEPS) == expected
        # Rank 0 removes the others, and may not have done it when another rank looks.
        mine = sorted(path.name for run in folder.iterdir() for path in run.iterdir() if path.is_dir())
        left = served.parallel.gather_over_world(mine)[0]
        assert len(left) == 2, f"the last two of three hand-overs stay: {left}"
        assert evaluated(served) == held_out

        ahead = open_trainer("brain", flags_of("brain", layout, context, *ahead_flags(context), *asked))
        drawn_ahead = steps(ahead, STEPS)
        with engine():
            copying = open_trainer("brain", flags_of("brain", layout, context, *ahead_flags(context)))
        assert drawn_ahead == steps(copying, STEPS)
        expect_equal(drawn_ahead, context.reference("ahead", drawn_ahead))


@some
def case_weights_by_the_engines_log_q_are_those_of_its_distribution(layout: Layout, context: Context) -> None:
    """With float32 on both sides the two log q' differ by rounding, so the run is nearly the one of the trainer's."""
    flags = [*brain_flags(context), "--train-iters", "2", "--lr-decay-style", "constant"]
    native = open_trainer("brain", flags_of("brain", layout, context, *flags))
    with servers(native, context, count=1) as url:
        expected = steps(native, 2)
        folder = context.shared / f"sync_engine_{context.world_size}_{layout.name}"
        asked = ["--engine", "vllm", "--engine-url", url, "--engine-sync-dir", str(folder)]
        asked += ["--proposal-logprobs", "engine"]
        served = open_trainer("brain", flags_of("brain", layout, context, *flags, *asked))
        found = steps(served, 2)
        for name, values in expected.items():
            assert found[name] != values
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-3, atol=1e-5)
