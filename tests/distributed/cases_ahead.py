"""Rounds drawn ahead: from the weights at the start of the round before, whoever is faster, and over a resume."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.copying_engine import CopyingEngine

from distributed.cases_brain import brain_flags, halves
from distributed.runs import expect_equal, flags_of, open_trainer, step
from distributed.world import Context, Layout, at

STEPS = 6
"""Three rounds of two steps."""


def ahead_flags(context: Context, *extra: str) -> list[str]:
    return [
        *brain_flags(context),
        *("--train-iters", str(STEPS), "--lr-decay-style", "constant", "--rounds-ahead", "1"),
        *("--engine", "vllm", "--engine-url", "http://nowhere:1", "--engine-sync-dir", "unused", *extra),
    ]


@contextlib.contextmanager
def engine(*, lazy: bool = False) -> Iterator[None]:
    """Runs draw with a `CopyingEngine`."""
    with mock.patch(
        "megatron_brain.stages.brain.rounds.open_engine", lambda run, *prompts: CopyingEngine(run, lazy=lazy)
    ):
        yield


def steps(trainer, count: int) -> dict[str, list[float]]:
    made = [step(trainer) for _ in range(count)]
    return {name: [metrics[name] for metrics in made] for name in ("loss", "grad_norm", "ess_beta")}


@halves
def case_rounds_ahead_train_as_one_process_does_whoever_is_faster(layout: Layout, context: Context) -> None:
    rollouts = context.shared / f"ahead_{context.world_size}_{layout.name}"
    found = []
    for lazy in (False, True):
        with engine(lazy=lazy):
            flags = ahead_flags(context, "--rollout-dir", str(rollouts))
            trainer = open_trainer("brain", flags_of("brain", layout, context, *flags))
        found.append(steps(trainer, STEPS))
    assert found[0] == found[1]
    expect_equal(found[0], context.reference("ahead", found[0]))
    expect_log_q_of_the_weights_that_drew(rollouts)
    # Round 1 was drawn from the weights that round 0 had, round 2 from those of the start of round 1.
    assert trainer.stage._maker.engine.given == ["iteration 0", "iteration 2"]


def expect_log_q_of_the_weights_that_drew(folder: Path) -> None:
    """The sampler says log q' of the weights that it drew from, and the trainer computes that of its copy."""
    torch.distributed.barrier()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            for response in json.loads(line)["responses"]:
                assert response["trainer_logprob"] == pytest.approx(response["sampler_logprob"], abs=2e-4), path.name
                assert response["log_proposal"] == response["trainer_logprob"]


@at(lambda layout: layout.name in ("tp2_sp", "pp2_interleaved", "dp2"))
def case_rounds_ahead_go_on_exactly_after_a_resume(layout: Layout, context: Context) -> None:
    for stop in (1, 2, 3) if layout.size == 1 else (3,):
        folder = context.shared / f"ahead_saved_{stop}_{context.world_size}_{layout.name}"
        with engine(lazy=True):
            flags = ahead_flags(context, "--save", str(folder))
            trainer = open_trainer("brain", flags_of("brain", layout, context, *flags))
            before = steps(trainer, stop)
            trainer.save()
            expected = steps(trainer, STEPS - stop)
            uninterrupted = {name: [*before[name], *expected[name]] for name in before}
            expect_equal(uninterrupted, context.reference("ahead", uninterrupted))
            kept = [flag for flag in ahead_flags(context) if flag != "--finetune"]
            kept += ["--load", str(folder), "--prior-load", str(context.shared / "prior")]
            resumed = open_trainer("brain", flags_of("brain", layout, context, *kept))
        assert steps(resumed, STEPS - stop) == expected, f"stopped after step {stop}"
