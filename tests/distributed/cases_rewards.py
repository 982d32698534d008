"""Rewards of several parts at every layout: the same sums, each function called once for a response, errors agreed."""

import json
import os
from pathlib import Path

import pytest
import torch

from distributed.cases_brain import brain_flags
from distributed.runs import expect_equal, flags_of, open_trainer, start, train
from distributed.world import Context, Layout, at
from megatron_brain.errors import AgreedError

halves = at(lambda layout: layout.size <= 2 or layout.name in ("tp2_dp2", "pp2_dp2"))

_RULES = '''
import os

def short(prompts, responses, records):
    """Shorter than the prompt is better. Each call is noted, with the ids of its records."""
    with open(os.environ["CALLS"], "a") as file:
        file.write("".join(record["id"] + "\\n" for record in records))
    return [0.01 * (len(prompt) - len(text)) for prompt, text in zip(prompts, responses)]

async def fails_on_one_rank(prompts, responses, records):
    if os.environ.get("RANK", "0") == os.environ.get("FAILS", "0"):
        raise KeyError("answer")
    return [0.0] * len(responses)

def hangs_on_one_rank(prompts, responses, records):
    while os.environ.get("RANK", "0") == os.environ.get("FAILS", "0"):
        pass
    return [0.0] * len(responses)
'''


def _rules(layout: Layout, context: Context) -> tuple[Path, Path]:
    """The file of functions, which one process writes, and the file that notes the calls of `short` at this layout."""
    path, calls = context.shared / "rules.py", context.shared / f"calls_{context.world_size}_{layout.name}.txt"
    if context.world_size == 1:
        path.write_text(_RULES)
    os.environ["CALLS"] = str(calls)
    return path, calls


@halves
def case_models_and_a_function_give_the_same_run_and_each_response_is_rewarded_once(
    layout: Layout, context: Context
) -> None:
    path, calls = _rules(layout, context)
    reward = start("reward", context)
    other = context.shared / "another" / "reward"
    if context.world_size == 1:
        other.parent.mkdir(exist_ok=True)
        other.symlink_to(reward)
    rollouts = context.shared / f"rewarded_{context.world_size}_{layout.name}"
    extra = ["--reward-load", f"{reward},{other}", "--reward-function", f"{path}:short"]
    extra += ["--reward-weights", "0.01,0.02,1", "--rollout-dir", str(rollouts)]
    actual = train("brain", layout, context, *brain_flags(context), *extra)
    expect_equal(actual, context.reference("rewards", actual))
    if torch.distributed.get_rank() == 0:
        lines = [json.loads(line) for line in (rollouts / "round_0000.jsonl").read_text().splitlines()]
        later = (rollouts / "round_0001.jsonl").read_text().splitlines()
        told = sorted(calls.read_text().split())
        written = sorted(json.loads(line)["id"] for line in later) + sorted(record["id"] for record in lines)
        assert told == sorted(written * 4), "each of the 4 responses of each prompt once"
        for record in lines:
            for response in record["responses"]:
                assert response["reward_parts"]["short"] == 0.01 * (len(record["prompt"]) - len(response["text"]))
        mine = [response["reward"] for record in lines for response in record["responses"]]
        assert mine == pytest.approx(context.reference("rewards_of_parts", mine), rel=1e-5)


@halves
def case_a_function_that_fails_or_hangs_on_one_rank_ends_all_with_its_words(layout: Layout, context: Context) -> None:
    path, _ = _rules(layout, context)
    for function, words in (("fails_on_one_rank", "raised KeyError on the record"), ("hangs_on_one_rank", "within")):
        flags = [*brain_flags(context), "--reward-load", "null", "--reward-function", f"{path}:{function}"]
        flags += ["--train-iters", "3", "--reward-timeout", "0.3"]
        trainer = open_trainer("brain", flags_of("brain", layout, context, *flags))
        with pytest.raises(AgreedError, match=f"rules.*py:{function} .*{words}") as caught:
            trainer.stage.micro_batches(trainer)
        told = trainer.parallel.gather_over_world(str(caught.value))
        assert len(set(told)) == 1 and ".jsonl:" in told[0]
        assert ("(rank 0 alone)" in told[0]) == (layout.size > 1)
