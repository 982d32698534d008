"""The same stage on CUDA and on the CPU gives the same numbers. Not run on a GPU yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.assets import size_flags, write_assets

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def losses(stage: str, data: str, work: Path, device: str) -> list[float]:
    """Losses and gradient norms of four steps in one process that sees CUDA or does not."""
    flags = [
        *("--train-data", str(work / data), "--tokenizer-model", str(work / "tokenizer"), "--seq-length", "64"),
        *("--train-iters", "4", "--global-batch-size", "8", "--lr", "1e-3", "--transformer-impl", "local"),
        *("--tensorboard-dir", str(work / f"{stage}_{device}"), *size_flags()),
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, "-m", "megatron_brain", stage, *flags], env=env, check=True)
    lines = (work / f"{stage}_{device}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines for name in ("loss", "grad_norm") if name in json.loads(line)]


@pytest.mark.parametrize(("stage", "data"), [("sft", "sft.jsonl"), ("reward", "pairs.jsonl")])
def test_cuda_trains_like_the_cpu(tmp_path, stage, data):
    write_assets(tmp_path)
    assert losses(stage, data, tmp_path, "cuda") == pytest.approx(losses(stage, data, tmp_path, "cpu"), rel=1e-3)
