"""Time of communication: the algorithms give the volumes, the places of the ranks give the bandwidths.

Ranks are ordered as megatron-core orders them: tensor-parallel ones next to each other, then context, data, pipeline.
"""

from megatron_brain.planning.machine import Machine
from megatron_brain.planning.sizes import linear_weights, pipeline_stage_layers
from megatron_brain.planning.traffic import bytes_per_value, key_value_width
from megatron_brain.planning.workload import Layout, Workload


def ring_share(size: int) -> float:
    """Share of a buffer that one rank sends when a ring gathers or reduce-scatters it."""
    return (size - 1) / size


def exposed(seconds: float, *, behind: float) -> float:
    """Seconds of communication that `behind` seconds of other work do not hide."""
    return max(0.0, seconds - behind)


def tensor_volume(workload: Workload, layout: Layout, tokens: float) -> float:
    """Bytes that one rank sends in one gather, or one reduce-scatter, of the residual stream of `tokens`."""
    return ring_share(layout.tensor) * tokens * workload.model.hidden_size * bytes_per_value(workload)


def tensor_seconds(workload: Workload, layout: Layout, machine: Machine, tokens: float) -> float:
    """Seconds of one gather, or one reduce-scatter, of the residual stream of `tokens` over tensor-parallel ranks.

    The forward pass of a layer has 4: it gathers before qkv and fc1 and reduce-scatters after projection and fc2. The
    backward pass gathers the gradients of the two outputs: 2. Behind matrix products it gathers the inputs of qkv and
    fc1 again, which are stored in parts, and reduce-scatters their gradients: 4. Without sequence parallelism there are
    all-reduces, each as much as a gather and a reduce-scatter: 4 forward, and 4 backward behind products.
    """
    return machine.link_seconds(tensor_volume(workload, layout, tokens), size=layout.tensor, stride=1)


def pipeline_seconds(workload: Workload, layout: Layout, machine: Machine, tokens: float) -> float:
    """Seconds to send the output of one chunk to the next pipeline stage."""
    if layout.pipeline == 1:
        return 0.0
    volume = tokens / layout.sequence_shards * workload.model.hidden_size * bytes_per_value(workload)
    return machine.hop_seconds(volume, world_size=layout.world_size)


def context_seconds(workload: Workload, layout: Layout, machine: Machine, tokens: float) -> float:
    """Seconds to send keys and values of one layer once round the ring of context-parallel ranks."""
    if layout.context == 1:
        return 0.0
    width = key_value_width(workload.model, layout.tensor)
    volume = (layout.context - 1) * tokens / layout.context * width * bytes_per_value(workload)
    return machine.link_seconds(volume, size=layout.context, stride=layout.tensor)


def data_seconds(
    workload: Workload, layout: Layout, machine: Machine, parameters: float, *, pipeline_stage: int
) -> float:
    """Seconds to exchange gradients and updated weights of one step between replicas, whether hidden or not.

    Gradients are float32. The distributed optimizer reduce-scatters them and gathers weights (in FP8 where they are
    kept in it); without it there is an all-reduce, twice a reduce-scatter. Fully sharded weights are gathered for each
    pass of every micro-batch, and their gradients reduce-scattered each time.
    """
    size = layout.data * layout.context
    if size == 1:
        return 0.0
    weight = bytes_per_value(workload) * parameters
    if workload.fp8_param_gather:
        layers = pipeline_stage_layers(workload.model, layout, pipeline_stage)
        weight -= layers * linear_weights(workload.model) / layout.tensor
    if layout.sharded_weights:
        volume = layout.num_micro_batches * (2 * weight + 4 * parameters)
    elif layout.distributed_optimizer:
        volume = weight + 4 * parameters
    else:
        volume = 2 * 4 * parameters
    return machine.link_seconds(ring_share(size) * volume, size=size, stride=layout.tensor)
