"""Emulated FP8 with pipeline and tensor parallelism."""

import pytest

from distributed.runs import expect_equal, random_start, train
from distributed.world import LAYOUTS, Context, Layout, at

_FLAGS = [
    *("--fp8-format", "hybrid", "--fp8-emulate", "--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "2"),
    *("--global-batch-size", "8", "--micro-batch-size", "4"),
]


@at(lambda layout: layout.name in ("pp2", "pp2_interleaved", "tp2_sp"))
def case_emulation(layout: Layout, context: Context) -> None:
    """Pipeline stages leave out the same layers as one process. Each tensor-parallel rank rounds its slice with its own
    scale, so results are nearly the same. Sequence parallelism changes nothing."""
    actual = train("sft", layout, context, *random_start(context), *_FLAGS)
    expected = context.reference("fp8_emulation", actual)
    if not layout.sp:
        expect_equal(actual, expected)
        return
    without = next(each for each in LAYOUTS[layout.size] if (each.tp, each.sp) == (layout.tp, False))
    expect_equal(actual, train("sft", without, context, *random_start(context), *_FLAGS))
    for name, values in expected.items():
        assert actual[name] != pytest.approx(values, rel=1e-6)
        assert actual[name] == pytest.approx(values, rel=2e-2)
