"""vLLM servers on GPUs of their own: the time in which they draw a round and take over weights, and how many it takes.

The formulas are those of continuous batching over a paged cache (Kwon et al. 2023, arXiv 2309.06180): a token round
reads the weights once and the cache of every response under way, and a response that ends makes room for the next one.
docs/planner.md states what is assumed.
"""

import bisect
import dataclasses
import math
from dataclasses import dataclass

from megatron_brain.config.model import ResolvedModel
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import padded_vocab_size
from megatron_brain.planning.activations import FLOAT32
from megatron_brain.planning.communication import ring_share, tensor_seconds
from megatron_brain.planning.machine import GIB, Machine
from megatron_brain.planning.sizes import pipeline_stage_parameters, total_parameters
from megatron_brain.planning.time import linear_seconds, prompt_timer
from megatron_brain.planning.traffic import ENGINE_CHOICE_BYTES, key_value_width, layer_forward_bytes
from megatron_brain.planning.workload import Layout, Workload

_BF16 = 2
_UTILIZATION = 0.9
"""Share of a GPU's memory that a server takes (--gpu-memory-utilization; examples/vllm/serve.sh sets it)."""
_WORKSPACE = 4 * GIB
"""Part of that for activations of a prefill and logits: an assumption."""
MOST_AT_ONCE = 1024
"""Responses that a server draws at one time at most: vLLM's default of --max-num-seqs on GPUs of 70 GiB or more."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Servers that draw responses, all of one size."""

    count: int
    tensor: int
    """Tensor-parallel size of each."""

    @property
    def gpus(self) -> int:
        """GPUs of all servers."""
        return self.count * self.tensor


def drawing_seconds(workload: Workload, servers: Servers, machine: Machine) -> float:
    """Seconds in which the servers draw a round, whose prompts are spread evenly.

    A server computes each of its prompts once, and draws all responses to it if there are enough prompts for all
    servers. Then its places stay full until its responses are drawn: R responses of
    L tokens take R L / b token rounds with b places.

    Raises:
        ConfigError: a server does not hold the weights and one response.
    """
    workload = dataclasses.replace(workload, precision="bf16")
    layout, responses = Layout(tensor=servers.tensor), _responses(workload, servers)
    prompts = math.ceil(workload.prompts_per_round / servers.count)
    rows = at_one_time(workload, servers, machine)
    waves = responses / rows
    tokens = (workload.response_length - 1) * _layers_seconds(workload, layout, machine, rows)
    tokens += workload.response_length * _choice_seconds(workload, layout, machine, rows)
    return prompt_timer(workload, layout, machine, prompts).forward(0).total + waves * tokens


def at_one_time(workload: Workload, servers: Servers, machine: Machine) -> int:
    """Responses that a server draws at one time: all of its round, unless the cache or vLLM's limit holds fewer.

    Raises:
        ConfigError: a server does not hold the weights and one response.
    """
    layout = Layout(tensor=servers.tensor)
    weights = _BF16 * pipeline_stage_parameters(untied(workload.model), layout, 0)
    room = _UTILIZATION * machine.memory_bytes - _WORKSPACE - weights
    # Responses to a prompt share its blocks; at the worst, all are at their end at the same time.
    sharing = min(workload.drawn_per_prompt, _responses(workload, servers))
    tokens = workload.prompt_length / sharing + workload.response_length
    each = _BF16 * key_value_width(workload.model, servers.tensor) * workload.model.num_layers * tokens
    if room < each:
        raise ConfigError(
            f"a server of {servers.tensor} GPUs has no room for a response beside its weights of {weights / GIB:.1f} "
            "GiB on each: use a larger tensor-parallel size"
        )
    return min(int(room / each), MOST_AT_ONCE, _responses(workload, servers))


def sync_seconds(workload: Workload, layout: Layout, servers: Servers, machine: Machine) -> tuple[float, float]:
    """Seconds of handing over the weights: all ranks write equal parts to shared storage; then each node with servers
    reads the whole once, and each GPU takes its part from host memory."""
    size = sync_bytes(workload.model)
    nodes = math.ceil(layout.world_size / machine.gpus_per_node)
    return machine.storage_seconds(size / nodes), machine.storage_seconds(size) + machine.host_seconds(
        size / servers.tensor
    )


def sync_bytes(model: ResolvedModel) -> int:
    """Bytes of the weights that servers read (`conversion.live`): bf16, or float32 where the run is in float32, with an
    output layer of its own where the model ties it."""
    return (_BF16 if model.bf16 else FLOAT32) * total_parameters(untied(model))


def untied(model: ResolvedModel) -> ResolvedModel:
    """The model as servers have it."""
    return dataclasses.replace(model, untie_embeddings_and_output_weights=True)


def tensor_sizes(model: ResolvedModel, machine: Machine) -> list[int]:
    """Tensor-parallel sizes that vLLM has for the model and that stay inside of a node."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    return [
        size
        for size in range(1, machine.gpus_per_node + 1)
        if machine.gpus_per_node % size == 0 and heads % size == 0 and (groups % size == 0 or size % groups == 0)
    ]


def fastest_servers(workload: Workload, machine: Machine, *, gpus: int, tensor: int | None) -> Servers:
    """The servers on so many GPUs that draw a round in the shortest time.

    Args:
        tensor: their tensor-parallel size, one of `tensor_sizes`; None: any of them.

    Raises:
        ConfigError: no server fits.
    """
    found = [
        (drawing_seconds(workload, servers, machine), servers.tensor, servers)
        for size in _sizes_that_fit(workload, machine, tensor)
        if gpus % size == 0 and (servers := Servers(count=gpus // size, tensor=size))
    ]
    if not found:
        raise ConfigError(f"engine_gpus={gpus} are no whole number of servers that hold the weights: use more")
    return min(found)[-1]


def fewest_servers(workload: Workload, machine: Machine, *, seconds: float, tensor: int | None) -> Servers | None:
    """The servers on the fewest GPUs that draw a round in `seconds`; None: not even one for each response does."""
    found = []
    for size in _sizes_that_fit(workload, machine, tensor):
        candidates = [
            Servers(count=count, tensor=size)
            for count in range(1, workload.prompts_per_round * workload.drawn_per_prompt + 1)
        ]
        place = bisect.bisect_left(
            candidates, -seconds, key=lambda servers: -drawing_seconds(workload, servers, machine)
        )
        found += candidates[place : place + 1]
    return min(found, key=lambda servers: (servers.gpus, servers.tensor), default=None)


def _sizes_that_fit(workload: Workload, machine: Machine, tensor: int | None) -> list[int]:
    """The tensor-parallel size, or all those whose servers hold the weights.

    Raises:
        ConfigError: there are none.
    """
    fit, problem = [], None
    for size in tensor_sizes(workload.model, machine) if tensor is None else [tensor]:
        try:
            at_one_time(workload, Servers(count=1, tensor=size), machine)
            fit.append(size)
        except ConfigError as error:
            problem = error
    if problem is not None and not fit:
        raise problem
    return fit


def _responses(workload: Workload, servers: Servers) -> int:
    """Responses of a round on the busiest server."""
    return math.ceil(workload.prompts_per_round * workload.drawn_per_prompt / servers.count)


def _layers_seconds(workload: Workload, layout: Layout, machine: Machine, rows: int) -> float:
    """Seconds of one token of `rows` responses through all layers, halfway through the responses."""
    model, tokens = workload.model, workload.prompt_length + workload.response_length / 2
    cache = rows * tokens * key_value_width(model, layout.tensor) * _BF16
    flops = 4 * rows * tokens * model.num_attention_heads / layout.tensor * model.kv_channels
    attention = max(machine.memory_seconds(cache), machine.compute_seconds(flops, "bf16"))
    linear = linear_seconds(workload, layout, machine, rows, "bf16")
    traffic = machine.memory_seconds(rows * layer_forward_bytes(workload, layout))
    layer = linear + attention + traffic + 4 * tensor_seconds(workload, layout, machine, rows)
    return model.num_layers * layer


def _choice_seconds(workload: Workload, layout: Layout, machine: Machine, rows: int) -> float:
    """Seconds of the logits of `rows` next tokens, of gathering them over tensor-parallel ranks, and of the choice."""
    vocabulary = padded_vocab_size(workload.model, layout.tensor)
    weights = vocabulary / layout.tensor * workload.model.hidden_size
    product = max(machine.compute_seconds(2 * rows * weights, "bf16"), machine.memory_seconds(_BF16 * weights))
    gathered = ring_share(layout.tensor) * rows * vocabulary * _BF16
    gather = machine.link_seconds(gathered, size=layout.tensor, stride=1)
    return product + gather + machine.memory_seconds(rows * vocabulary * ENGINE_CHOICE_BYTES)
