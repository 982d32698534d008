"""Models of other families than Llama train alike at every layout: losses, gradient norms and weights."""

from functools import partial

import pytest
import torch
from helpers.architectures import ARCHITECTURES, flags

from distributed.runs import flags_of, open_trainer, random_start, step
from distributed.weights import gather_weights, relative_differences
from distributed.world import Context, Layout, at

STEPS = 2
TOLERANCE = 1e-5


def expect_training_of_one_process(name: str, layout: Layout, context: Context) -> None:
    """Biases, norms over heads and parallel residuals count once in gradients and gradient norms, and are whole."""
    trainer = open_trainer(
        "sft",
        flags_of(
            "sft",
            layout,
            context,
            *random_start(context),
            *flags(ARCHITECTURES[name]),
            *("--train-iters", str(STEPS), "--lr-decay-style", "constant", "--weight-decay", "0.1"),
            # matrix.stage_flags says why.
            *("--adam-eps", "1e-5"),
        ),
    )
    steps = [step(trainer) for _ in range(STEPS)]
    weights = gather_weights(trainer.gathered_chunks())
    actual = {key: [metrics[key] for metrics in steps] for key in ("loss", "grad_norm")}
    expected = context.reference(f"architecture_{name}", actual)
    for key, values in expected.items():
        assert actual[key] == pytest.approx(values, rel=TOLERANCE), f"{key}: {actual[key]}, one process: {values}"
    path = context.shared / f"weights_{name}.pt"
    if context.world_size == 1:
        torch.save(weights, path)
    if weights:
        differences = relative_differences(weights, torch.load(path))
        different = {key: value for key, value in differences.items() if value > TOLERANCE}
        assert not different, f"relative differences of weights: {different}"


CASES = {
    name: at(lambda layout: layout.name in ("tp2", "tp2_sp", "pp2", "tp2_sp_pp2"))(
        partial(expect_training_of_one_process, name)
    )
    for name in ARCHITECTURES
}
