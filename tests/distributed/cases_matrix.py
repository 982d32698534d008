"""Losses, gradient norms and final weights depend on data and seed, never on the layout. matrix.py has the entries."""

from functools import partial

import pytest
import torch

from distributed.matrix import (
    BF16_TOLERANCE,
    GLOBAL_BATCH_SIZE,
    MATRIX,
    REFERENCES,
    STEPS,
    TOLERANCE,
    Entry,
    stage_flags,
    write_data,
)
from distributed.runs import open_trainer, start
from distributed.weights import gather_weights, relative_differences
from distributed.world import Context, Layout


def train(entry: Entry, layout: Layout, context: Context, *extra: str) -> tuple[dict[str, list[float]], dict]:
    """Losses and gradient norms of the steps, and the final weights on rank 0."""
    flags = [*stage_flags(entry.stage, context.shared, context.assets / "tokenizer"), *layout.flags()]
    trainer = open_trainer(entry.stage, [*flags, *REFERENCES[entry.reference], *extra])
    steps, tokens = [], []
    for _ in range(STEPS):
        micro_batches = trainer.stage.micro_batches(trainer)
        tokens.append(sum(map(len, (r for groups in micro_batches for group in groups for r in group.responses))))
        steps.append(trainer.step(micro_batches))
    shares = trainer.parallel.gather_over_data_parallel(tokens)
    assert len(shares) == 1 or any(len(set(step)) > 1 for step in zip(*shares, strict=True)), (
        "some step gives replicas different numbers of tokens"
    )
    weights = gather_weights(trainer.gathered_chunks())
    return {name: [step[name] for step in steps] for name in ("loss", "grad_norm")}, weights


def expect_reference(entry: Entry, layout: Layout, context: Context) -> None:
    """Run an entry and compare it with its reference."""
    expected = reference(entry, layout, context)
    flags = entry.flags if "--micro-batch-size" in entry.flags else (*entry.flags, *micro_batch_size(layout))
    actual, weights = train(entry, layout, context, *flags)
    tolerance = BF16_TOLERANCE if entry.is_bf16 else TOLERANCE
    for name in ["loss"] if entry.is_bf16 else ["loss", "grad_norm"]:
        assert actual[name] == pytest.approx(expected[name], rel=tolerance), (
            f"{name}: {actual[name]}, one process: {expected[name]}"
        )
    if weights and not entry.is_bf16:
        wanted = torch.load(context.shared / f"weights_{entry.reference}.pt")
        different = {key: value for key, value in relative_differences(weights, wanted).items() if value > tolerance}
        assert not different, f"relative differences of weights: {different}"


def micro_batch_size(layout: Layout) -> tuple[str, str]:
    """Flags of micro-batches of up to 4 samples, so small that every pipeline stage has two micro-batches. With one,
    pipeline stages that mix up the chunks of the interleaved schedule would not be noticed."""
    least = 2 * layout.pp if layout.pp > 1 else 1
    return "--micro-batch-size", str(min(4, GLOBAL_BATCH_SIZE // (layout.dp * least)))


def reference(entry: Entry, layout: Layout, context: Context) -> dict[str, list[float]]:
    """The numbers of one process. The world of one computes them at their first use."""
    name = f"matrix_{entry.reference}"
    if context.world_size > 1 or name in context.recorded:
        return context.expected(name)
    write_data(context.shared)
    start("sft", context)
    result, weights = train(entry, layout, context, "--micro-batch-size", "4")
    torch.save(weights, context.shared / f"weights_{entry.reference}.pt")
    return context.reference(name, result)


CASES = {name: partial(expect_reference, entry) for name, entry in MATRIX.items()}
