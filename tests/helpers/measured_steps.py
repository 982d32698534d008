"""Runs training steps of the workload of a memory estimate."""

import dataclasses

from helpers.tiny_training import Training
from megatron_brain.config.parallel import ParallelConfig
from megatron_brain.data.groups import Group, PackedBatch, pack_groups
from megatron_brain.planning.workload import Layout, Workload
from megatron_brain.runtime.parallel import Parallel


def train_steps(workload: Workload, layout: Layout, parallel: Parallel, *, steps: int = 2) -> None:
    """Build the model and its optimizer, and train. From the second step on, the forward pass has optimizer state."""
    recompute = {
        "recompute_granularity": None if layout.recompute == "none" else layout.recompute,
        "recompute_method": layout.recompute_method if layout.recompute == "full" else None,
        "recompute_num_layers": layout.recompute_num_layers if layout.recompute == "full" else None,
    }
    sizes = dataclasses.asdict(workload.model) | recompute
    bf16, num_layers = {"fp32": False, "bf16": True}[workload.precision], workload.model.num_layers
    training = Training(
        parallel,
        head=workload.head,
        layout=parallel_config(layout, num_layers),
        distributed_optimizer=layout.distributed_optimizer,
        batches=[_batch(workload) for _ in range(layout.num_micro_batches)],
        **sizes | {"bf16": bf16},
    )
    for _ in range(steps):
        training.step()


def parallel_config(layout: Layout, num_layers: int) -> ParallelConfig:
    """The layout as the configuration of a run."""
    chunk = num_layers // layout.pipeline // layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
    return ParallelConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        num_layers_per_virtual_pipeline_stage=chunk,
        sequence_parallel=layout.sequence_parallel,
    )


def _batch(workload: Workload) -> PackedBatch:
    responses = ((2,) * workload.response_length,) * workload.samples_per_prompt
    group = Group(prompt=(1,) * workload.prompt_length, responses=responses)
    batch = pack_groups([group], shared_prefix=workload.shared_prefix)
    return dataclasses.replace(batch, known_gradient=-batch.loss_mask.float()) if workload.known_gradient else batch
