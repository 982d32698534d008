"""A language model that judges: one rank asks it while the others wait, and an error is that of all."""

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.stub_json import StubJson, chat_judge

from distributed.runs import start
from distributed.world import Context, Layout, at
from megatron_brain.errors import AgreedError
from megatron_brain.files import write_whole

_PROMPTS = 3

some = at(lambda layout: layout.name in ("tp2_sp", "pp2", "dp2"))


@some
def case_one_rank_asks_a_language_judge_and_the_report_is_that_of_one_process(layout: Layout, context: Context) -> None:
    place = context.shared / f"judge_{context.world_size}_{layout.name}.url"
    with _shared_stub(chat_judge(lambda message: "A" if len(message) % 3 else "tie"), place) as (stub, url):
        report = _evaluated(layout, context, url, "judged")
    if stub is not None:
        # One is the sample. The policy is the baseline, so only the reference is compared with.
        assert len(stub.requests) == 1 + 2 * _PROMPTS
        told = {
            "rows": [row["llm/policy_vs_reference"] for row in report["rows"]],
            "metrics": {name: value for name, value in report["metrics"].items() if "llm" in name},
            "counts": report["llm_judge"]["comparisons"],
        }
        assert told == context.reference("judged", told)
        assert told["metrics"]["win_rate/llm/policy_vs_baseline"]["value"] == 0.5
        assert told["counts"]["policy_vs_baseline"]["equal_texts"] == _PROMPTS


@some
def case_a_language_judge_that_fails_ends_all_ranks_with_one_message(layout: Layout, context: Context) -> None:
    place = context.shared / f"refusing_judge_{context.world_size}_{layout.name}.url"
    answers = chat_judge(lambda message: "A")

    def refuses(number: int, request: dict) -> tuple:
        return answers(number, request) if number == 0 else (400, "no credit")

    def refused(name: str) -> str:
        with pytest.raises(AgreedError, match="answered with status 400 on .*no credit") as caught:
            _evaluated(layout, context, url, name)
        told: list = [None] * layout.size
        torch.distributed.all_gather_object(told, str(caught.value))
        assert len(set(told)) == 1
        return told[0]

    with _shared_stub(refuses, place) as (_, url):
        output = _output(layout, context, "refused")
        assert f"The report without verdicts is {output}" in refused("refused")
        report = json.loads(output.read_text())
        assert len(report["rows"]) == _PROMPTS and "kl_to_prior" in report["metrics"]
        assert report["llm_judge"]["comparisons"]["policy_vs_reference"]["compared"] == 0
        assert "on a sample" in refused("refused_at_once")
    assert not _output(layout, context, "refused_at_once").exists()


@contextmanager
def _shared_stub(reply, place: Path):
    """A server that the first rank runs (None on the others), and its address, which it leaves in a file."""
    if os.environ.get("RANK", "0") == "0":
        with StubJson(reply) as stub:
            write_whole(place, stub.url)
            yield stub, stub.url
            torch.distributed.barrier()
    else:
        while not place.exists():
            time.sleep(0.01)
        yield None, place.read_text()
        torch.distributed.barrier()


def _output(layout: Layout, context: Context, name: str) -> Path:
    return context.shared / f"{name}_{context.world_size}_{layout.name}.json"


def _evaluated(layout: Layout, context: Context, url: str, name: str) -> dict | None:
    """The report of an evaluation, on the rank that writes it. Ranks hear of each other every 20 ms."""
    from megatron_brain.config.loader import load_config
    from megatron_brain.stages.evaluate import llm_judge
    from megatron_brain.stages.evaluate.stage import main
    from megatron_brain.training.start import open_run

    output = _output(layout, context, name)
    model = str(start("sft", context))
    flags = ["--load", model, "--prior-load", model, "--prompts", str(context.assets / "sft.jsonl")]
    flags += ["--max-prompts", str(_PROMPTS), "--max-new-tokens", "8", "--seq-length", "64", "--output", str(output)]
    flags += ["--judge-url", url, "--judge-model", "m", "--judge-timeout", "20", "--no-progress", *layout.flags()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_judge, "_SLICE", 0.02)
        main(open_run(load_config("evaluate", flags)))
    return json.loads(output.read_text()) if output.exists() and torch.distributed.get_rank() == 0 else None
