"""The planner's estimate of memory equals what a rank with pipeline parallelism needs, with several micro-batches."""

import sys
from pathlib import Path

import pytest

from distributed.world import Context, Layout, at

_TOOLS = Path(__file__).parents[2] / "tools"
_SIZES = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


@at(lambda layout: layout.pp == 2 and layout.size == 2)
def case_peak_of_a_training_step(layout: Layout, context: Context) -> None:
    from helpers.measured_steps import parallel_config, train_steps

    from megatron_brain.config.model import ModelConfig
    from megatron_brain.models.architecture import resolve
    from megatron_brain.planning import workload as planning
    from megatron_brain.planning.memory import pipeline_stage_memory
    from megatron_brain.runtime import parallel as runtime

    model = resolve(ModelConfig(**_SIZES), None, "the test")
    workload = planning.Workload(stage="sft", model=model, prompt_length=192, response_length=64, precision="fp32")
    plan = planning.Layout(
        pipeline=layout.pp,
        virtual_pipeline=_SIZES["num_layers"] // layout.pp if layout.layers_per_virtual_stage else 1,
        num_micro_batches=4,
    )
    parallel = runtime.start(parallel_config(plan, model.num_layers), seed=1, num_layers=model.num_layers)
    sys.path.append(str(_TOOLS))
    try:
        from benchmarks import allocations
    finally:
        sys.path.remove(str(_TOOLS))
    with allocations.recorded() as found:
        train_steps(workload, plan, parallel)
    estimate = max(memory.total for memory in pipeline_stage_memory(workload, plan, parallel.pp_rank, impl="local"))
    assert found.peak == pytest.approx(estimate, rel=0.05)
