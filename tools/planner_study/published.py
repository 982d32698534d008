"""Published throughput to fit and to test the time model: DGX H100, FP8 with a scale for each tensor.

Source: NVIDIA NeMo Framework performance summary, tables of the DGX H100 system,
https://docs.nvidia.com/nemo-framework/user-guide/latest/performance/performance-summary.html.

The tables give sizes, layout and throughput. We assume beyond them, for all results: tensor-parallel communication is
overlapped with matrix products (the public recipes name configurations for it), weight gradients are added in the
product that makes them, nothing is computed again, logits are whole, every token is predicted, and attention goes over
the whole sequence. The 126 layers of llama3.1-405b fill 64 chunks only if embedding and output layer count as one each.
"""

import dataclasses
from dataclasses import dataclass

from megatron_brain.planning.presets import preset
from megatron_brain.planning.workload import Layout, Workload

_ALL_LOGITS = 2**62


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published result."""

    name: str
    workload: Workload
    layout: Layout
    tokens_per_second: float
    """Tokens per second of one GPU."""


def _result(
    name: str, model: str, *, gpus: int, batch: int, length: int, tokens_per_second: float, **layout: int | bool
) -> Published:
    """A result from its row of the table; micro-batches have one sequence."""
    replica = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    data = gpus // replica
    return Published(
        name=name,
        workload=Workload(
            stage="sft",
            model=dataclasses.replace(preset(model), logprob_chunk_size=_ALL_LOGITS),
            prompt_length=0,
            response_length=length,
            seq_length=length,
            global_batch_size=batch,
            precision="fp8",
        ),
        layout=Layout(
            data=data,
            num_micro_batches=batch // data,
            sequence_parallel=layout.get("tensor", 1) > 1,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            overlap_tensor_comm=True,
            gradient_accumulation_fusion=True,
            **layout,
        ),
        tokens_per_second=tokens_per_second,
    )


PUBLISHED = {
    result.name: result
    for result in (
        _result(
            "llama3-70b",
            "llama3-70b",
            gpus=64,
            batch=256,
            length=8192,
            tensor=4,
            pipeline=8,
            virtual_pipeline=5,
            tokens_per_second=1664,
        ),
        _result(
            "llama3.1-405b",
            "llama3.1-405b",
            gpus=1024,
            batch=1536,
            length=8192,
            tensor=8,
            pipeline=8,
            context=2,
            virtual_pipeline=8,
            account_for_ends=True,
            tokens_per_second=328,
        ),
        _result(
            "llama3-70b-sft",
            "llama3-70b",
            gpus=32,
            batch=32,
            length=4096,
            tensor=4,
            pipeline=4,
            virtual_pipeline=5,
            tokens_per_second=1638,
        ),
        _result(
            "llama3-8b", "llama3-8b", gpus=8, batch=128, length=8192, sharded_weights=True, tokens_per_second=14451
        ),
    )
}
"""The results by name."""

FITTED = ("llama3-70b", "llama3.1-405b")
"""The results that the H100's efficiency is fitted to, pretraining on many GPUs; the others are predicted."""
