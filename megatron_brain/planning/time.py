"""Seconds of one optimizer step: a roofline with one fitted number, `Machine.efficiency` (docs/planner.md)."""

import dataclasses
import math
from dataclasses import dataclass, fields

from megatron_brain.config.stage_spec import Head
from megatron_brain.models.architecture import padded_vocab_size
from megatron_brain.models.logit_blocks import block_shape, positions_of_whole_rows
from megatron_brain.planning.communication import (
    context_seconds,
    data_seconds,
    exposed,
    pipeline_seconds,
    tensor_seconds,
)
from megatron_brain.planning.machine import Machine
from megatron_brain.planning.sizes import (
    attention_flops,
    linear_flops,
    pipeline_stage_layers,
    pipeline_stage_parameters,
)
from megatron_brain.planning.traffic import (
    LOGIT_AGAIN_BYTES,
    LOGIT_FORWARD_BYTES,
    LOGIT_GRADIENT_BYTES,
    PRODUCT_BYTES,
    SUM_BYTES,
    gradient_bytes,
    layer_backward_bytes,
    layer_forward_bytes,
    linear_operand_bytes,
    update_bytes,
)
from megatron_brain.planning.workload import Layout, Precision, Workload

# Matrix products of attention's backward pass for each one of its forward pass; it computes the probabilities again.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    """Seconds of one micro-batch on one pipeline stage: work of the GPU, and communication among its ranks."""

    compute: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.communication

    def __add__(self, other: "PassSeconds") -> "PassSeconds":
        return PassSeconds(compute=self.compute + other.compute, communication=self.communication + other.communication)

    def __mul__(self, factor: float) -> "PassSeconds":
        return PassSeconds(compute=self.compute * factor, communication=self.communication * factor)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step by part. Communication counts only where no other work hides it."""

    compute: float
    """Forward and backward passes on the busiest pipeline stage: matrix products, attention and memory traffic."""

    tensor_communication: float
    """Communication between the tensor-parallel ranks of the busiest pipeline stage."""

    pipeline_communication: float
    """Communication between pipeline stages."""

    bubble: float
    """Waiting for the pipeline to fill and to empty."""

    data_communication: float
    """Communication of gradients and weights between replicas."""

    optimizer: float
    """AdamW's memory traffic."""

    sampling: float = 0.0
    """brain: a step's share of drawing a round's responses; with rounds ahead of what training does not hide."""

    sync: float = 0.0
    """brain: a step's share of handing the weights to the servers that draw."""

    scoring: float = 0.0
    """brain: a step's share of a round's forward passes of policy, prior and reward model."""

    @property
    def total(self) -> float:
        seconds: float = sum(getattr(self, field.name) for field in fields(self))
        return seconds


def linear_seconds(workload: Workload, layout: Layout, machine: Machine, tokens: float, precision: Precision) -> float:
    """Seconds of one product with each linear map of a layer on one rank: of operations or traffic, the longer one."""
    flops = linear_flops(workload.model, tokens) / layout.tensor
    operands = linear_operand_bytes(workload, layout, tokens, precision)
    return max(machine.compute_seconds(flops, precision), machine.memory_seconds(operands))


class PassTimer:
    """Times of passes of one micro-batch over the pipeline stages of a layout.

    Args:
        workload: its model, lengths and precision.
        layout: which rank holds which layers.
        machine: the GPU that they run on.
        head: head of the model that is passed through; None: that of the model that trains.
    """

    def __init__(self, workload: Workload, layout: Layout, machine: Machine, *, head: Head | None = None) -> None:
        self.workload, self.layout, self.machine = workload, layout, machine
        self._model, self._head_kind = workload.model, head or workload.head
        self._dense: Precision = "fp32" if workload.precision == "fp32" else "bf16"
        self._tokens = workload.micro_batch_tokens(layout)
        self._local = self._tokens / layout.context
        # A token budget may cut a sample, and then attention and targets too.
        samples = min(layout.micro_batch_size, self._tokens / workload.sample_tokens)
        self._attention_flops = attention_flops(self._model, workload.segments) * samples / layout.context
        self._targets = workload.sample_targets * samples / layout.context

    def forward(self, pipeline_stage: int) -> PassSeconds:
        """Forward pass of one pipeline stage, with the head."""
        seconds = self._layer_forward() * pipeline_stage_layers(self._model, self.layout, pipeline_stage)
        head = self.head_forward() if self._is_last(pipeline_stage) else 0.0
        return seconds + PassSeconds(compute=head, communication=self._ends(pipeline_stage))

    def training(self, pipeline_stage: int) -> PassSeconds:
        """Forward and backward pass of one pipeline stage, with the head and what is computed again."""
        layers = pipeline_stage_layers(self._model, self.layout, pipeline_stage)
        seconds = self._layer_forward() * (layers + self._layers_again(layers)) + self._layer_backward() * layers
        if self.layout.recompute == "selective":
            seconds += PassSeconds(compute=self._attention()) * layers
        head = self.head_training() if self._is_last(pipeline_stage) else 0.0
        return seconds + PassSeconds(compute=head, communication=2 * self._ends(pipeline_stage))

    def head_forward(self) -> float:
        """Seconds of the targets' log-probabilities: one product, and the softmax's traffic."""
        return self._head(products=1, traffic=LOGIT_FORWARD_BYTES)

    def head_training(self) -> float:
        """Seconds of log-probabilities and their gradient: three products where the gradient is known beforehand or one
        block holds all logits, otherwise four."""
        known = self.workload.known_gradient
        once = known or self._logits() <= self._model.logprob_chunk_size
        again = 0 if once else LOGIT_AGAIN_BYTES
        seconds = self._head(products=3 if once else 4, traffic=LOGIT_FORWARD_BYTES + LOGIT_GRADIENT_BYTES + again)
        return seconds + self.machine.memory_seconds(self._sums_of_blocks(known_gradient=known))

    def sends(self, busy: PassSeconds, *, passes: int) -> float:
        """Seconds that a micro-batch's chunks wait for the output of their neighbours: the whole transfer in a plain
        pipeline, only what exceeds a chunk's own work in an interleaved one.

        Args:
            busy: seconds of the micro-batch on the pipeline stage.
            passes: 1 for a forward pass, 2 for forward and backward pass.
        """
        count = passes * self.layout.virtual_pipeline
        one = pipeline_seconds(self.workload, self.layout, self.machine, self._tokens)
        behind = busy.total / count if self.layout.virtual_pipeline > 1 else 0.0
        return count * exposed(one, behind=behind)

    def _is_last(self, pipeline_stage: int) -> bool:
        return pipeline_stage == self.layout.pipeline - 1

    def _logits(self) -> float:
        """Number of logits of one micro-batch on one rank."""
        return self._targets * padded_vocab_size(self._model, self.layout.tensor) / self.layout.tensor

    def _sums_of_blocks(self, *, known_gradient: bool) -> float:
        """Bytes of traffic to sum the gradients of blocks of logits: the weight's over blocks of positions, that of the
        hidden states over blocks of ids."""
        rows, targets = padded_vocab_size(self._model, self.layout.tensor) // self.layout.tensor, self._targets
        if self._head_kind == "reward" or targets == 0:
            return 0.0
        chunk = self._model.logprob_chunk_size
        if known_gradient:
            positions, ids = positions_of_whole_rows(rows, chunk), rows
        else:
            positions, ids = block_shape(math.ceil(targets), rows, chunk)
        of_positions, of_ids = math.ceil(targets / positions), math.ceil(rows / ids)
        added = SUM_BYTES + (0 if self._dense == "fp32" else PRODUCT_BYTES)
        sums = (of_positions > 1) * of_positions * rows + (of_ids > 1) * of_ids * targets
        return sums * self._model.hidden_size * added

    def _head(self, *, products: int, traffic: int) -> float:
        if self._head_kind == "reward":
            return 0.0
        logits = self._logits()
        flops = products * 2 * logits * self._model.hidden_size
        return self.machine.compute_seconds(flops, self._dense) + self.machine.memory_seconds(logits * traffic)

    def _linear(self) -> float:
        """Seconds of one product with each linear map of an average layer: some layers may be left out of FP8."""
        workload, layers = self.workload, self._model.num_layers
        left_out = sum(workload.bf16_layers) / layers if workload.precision == "fp8" else 0.0
        seconds = linear_seconds(workload, self.layout, self.machine, self._local, workload.precision)
        dense = linear_seconds(workload, self.layout, self.machine, self._local, self._dense) if left_out else 0.0
        return (1 - left_out) * seconds + left_out * dense

    def _attention(self) -> float:
        """Seconds of a forward pass of a layer's core attention, which FP8 does not change."""
        return self.machine.compute_seconds(self._attention_flops / self.layout.tensor, self._dense)

    def _layer_forward(self) -> PassSeconds:
        linear, attention = self._linear(), self._attention()
        traffic = self._local * layer_forward_bytes(self.workload, self.layout)
        return PassSeconds(
            compute=linear + attention + self.machine.memory_seconds(traffic),
            communication=self._tensor(volumes=4, behind=linear) + self._context(passes=1, behind=attention),
        )

    def _layer_backward(self) -> PassSeconds:
        """The backward pass has two products for each one of the forward pass."""
        linear, attention = 2 * self._linear(), _ATTENTION_BACKWARD * self._attention()
        traffic = self._local * layer_backward_bytes(self.workload, self.layout)
        traffic += gradient_bytes(self.workload, self.layout)
        waited, hidden = (2, 4) if self.layout.sequence_parallel else (0, 4)
        return PassSeconds(
            compute=linear + attention + self.machine.memory_seconds(traffic),
            # The ring sends keys and values again, and their gradients.
            communication=self._tensor(volumes=waited, hidden=hidden, behind=linear)
            + self._context(passes=2, behind=attention),
        )

    def _tensor(self, *, volumes: int, hidden: int = 0, behind: float = 0.0) -> float:
        """Seconds of `volumes` gathers or reduce-scatters, and of `hidden` ones that go on behind matrix products."""
        one = tensor_seconds(self.workload, self.layout, self.machine, self._local)
        if self.layout.overlap_tensor_comm:
            return exposed((volumes + hidden) * one, behind=behind)
        return volumes * one + exposed(hidden * one, behind=behind)

    def _context(self, *, passes: int, behind: float) -> float:
        one = context_seconds(self.workload, self.layout, self.machine, self._tokens)
        return exposed(passes * one, behind=behind)

    def _ends(self, pipeline_stage: int) -> float:
        """Seconds in which embedding and head exchange the residual stream, once in a pass."""
        ends = (pipeline_stage == 0) + self._is_last(pipeline_stage)
        return ends * tensor_seconds(self.workload, self.layout, self.machine, self._local)

    def _layers_again(self, layers: int) -> int:
        """Layers of a pipeline stage whose forward pass is computed again."""
        if self.layout.recompute != "full":
            return 0
        if self.layout.recompute_method == "uniform":
            return layers
        chunks = self.layout.virtual_pipeline
        return chunks * min(layers // chunks, self.layout.recompute_num_layers)


def training_time(workload: Workload, layout: Layout, machine: Machine) -> StepTime:
    """Seconds of one optimizer step, without the sampling and scoring of a round of brain."""
    timer = PassTimer(workload, layout, machine)
    pipeline_stages = range(layout.pipeline)
    busy = [timer.training(one) for one in pipeline_stages]
    parts = _over_pipeline(timer, busy, layout, passes=2)
    if workload.two_pass:
        before = _over_pipeline(timer, [timer.forward(one) for one in pipeline_stages], layout, passes=1)
        parts = {name: seconds + before[name] for name, seconds in parts.items()}
    return StepTime(
        **parts,
        data_communication=max(_data_time(workload, layout, machine, one, busy[one].total) for one in pipeline_stages),
        optimizer=max(_optimizer_time(workload, layout, machine, one) for one in pipeline_stages),
    )


def prompt_timer(workload: Workload, layout: Layout, machine: Machine, prompts: int) -> PassTimer:
    """Times of a pass over `prompts` prompts at one time, without responses."""
    alone = dataclasses.replace(workload, response_length=0, samples_per_prompt=1, seq_length=None)
    batch = dataclasses.replace(layout, micro_batch_size=prompts, max_tokens_per_micro_batch=None)
    return PassTimer(alone, batch, machine)


def forward_seconds(timer: PassTimer) -> float:
    """Seconds of a forward pass of all micro-batches of a step through the pipeline."""
    layout = timer.layout
    busy = [timer.forward(pipeline_stage) for pipeline_stage in range(layout.pipeline)]
    return sum(_over_pipeline(timer, busy, layout, passes=1).values())


def _over_pipeline(timer: PassTimer, busy: list[PassSeconds], layout: Layout, *, passes: int) -> dict[str, float]:
    """Seconds of all micro-batches at the pace of the busiest pipeline stage, and the bubble, (p - 1) / (v m) of it."""
    busiest = max(busy, key=lambda seconds: seconds.total)
    count, sends = layout.num_micro_batches, timer.sends(busiest, passes=passes)
    return {
        "compute": count * busiest.compute,
        "tensor_communication": count * busiest.communication,
        "pipeline_communication": count * sends,
        "bubble": (layout.pipeline - 1) / layout.virtual_pipeline * (busiest.total + sends),
    }


def _data_time(workload: Workload, layout: Layout, machine: Machine, pipeline_stage: int, micro_batch: float) -> float:
    """Seconds of gradients and weights between replicas that nothing hides: the last micro-batch's backward pass hides
    the reduction, the first one's forward pass the gathering, and every pass hides those of fully sharded weights."""
    parameters = pipeline_stage_parameters(workload.model, layout, pipeline_stage, workload.head)
    seconds = data_seconds(workload, layout, machine, parameters, pipeline_stage=pipeline_stage)
    if layout.sharded_weights:
        return exposed(seconds, behind=micro_batch * layout.num_micro_batches)
    if layout.overlap_grad_reduce and (layout.overlap_param_gather or not layout.distributed_optimizer):
        return exposed(seconds, behind=micro_batch)
    return seconds


def _optimizer_time(workload: Workload, layout: Layout, machine: Machine, pipeline_stage: int) -> float:
    parameters = pipeline_stage_parameters(workload.model, layout, pipeline_stage, workload.head)
    replicas = layout.data * layout.context
    shard = parameters / replicas if layout.distributed_optimizer or layout.sharded_weights else parameters
    held = shard if layout.sharded_weights else parameters
    return machine.memory_seconds(update_bytes(workload, held, shard))
