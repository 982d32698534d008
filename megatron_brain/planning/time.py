"""Seconds of one optimizer step: a roofline with one fitted number, `Machine.efficiency` (docs/planner.md)."""

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
    stage_layers,
    stage_parameters,
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

# Matrix products of attention's backward pass, which computes the probabilities again, for each of its forward pass.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """One micro-batch on one pipeline stage: work of the GPU, and communication inside of the stage."""

    compute: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.communication

    def __add__(self, other: "StageSeconds") -> "StageSeconds":
        return StageSeconds(
            compute=self.compute + other.compute, communication=self.communication + other.communication
        )

    def __mul__(self, factor: float) -> "StageSeconds":
        return StageSeconds(compute=self.compute * factor, communication=self.communication * factor)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step by part. Communication counts as far as nothing hides it."""

    compute: float
    """Forward and backward passes on the busiest stage: matrix products, attention and memory traffic."""

    tensor_communication: float
    """Over the tensor-parallel ranks of the busiest stage."""

    pipeline_communication: float
    """Between stages."""

    bubble: float
    """Waiting for the pipeline to fill and to empty."""

    data_communication: float
    """Gradients and weights over replicas."""

    optimizer: float
    """AdamW's memory traffic."""

    sampling: float = 0.0
    """brain: drawing responses, a step's share of a round."""

    scoring: float = 0.0
    """brain: forward passes of policy, prior and reward model, a step's share of a round."""

    @property
    def total(self) -> float:
        seconds: float = sum(getattr(self, field.name) for field in fields(self))
        return seconds


def linear_seconds(workload: Workload, layout: Layout, machine: Machine, tokens: float, precision: Precision) -> float:
    """One product with each linear map of a layer on one rank: as long as its operations or its operands take."""
    flops = linear_flops(workload.model, tokens) / layout.tensor
    operands = linear_operand_bytes(workload, layout, tokens, precision)
    return max(machine.compute_seconds(flops, precision), machine.memory_seconds(operands))


class PassTimer:
    """Times of passes of one micro-batch over the stages of a layout.

    Args:
        workload: its model, lengths and precision.
        layout: where layers are.
        machine: what they run on.
        head: of the model that passes, where it is not the one that trains.
    """

    def __init__(self, workload: Workload, layout: Layout, machine: Machine, *, head: Head | None = None) -> None:
        self.workload, self.layout, self.machine = workload, layout, machine
        self._model, self._head_kind = workload.model, head or workload.head
        self._dense: Precision = "fp32" if workload.precision == "fp32" else "bf16"
        self._tokens = workload.micro_batch_tokens(layout)
        self._local = self._tokens / layout.context
        # A token budget may cut a sample: attention and targets are cut with it.
        samples = min(layout.micro_batch_size, self._tokens / workload.sample_tokens)
        self._attention_flops = attention_flops(self._model, workload.segments) * samples / layout.context
        self._targets = workload.sample_targets * samples / layout.context

    def forward(self, stage: int) -> StageSeconds:
        """A forward pass of one stage, with the head."""
        seconds = self._layer_forward() * stage_layers(self._model, self.layout, stage)
        head = self.head_forward() if self._is_last(stage) else 0.0
        return seconds + StageSeconds(compute=head, communication=self._ends(stage))

    def training(self, stage: int) -> StageSeconds:
        """Forward and backward pass of one stage, with the head and what is computed again."""
        layers = stage_layers(self._model, self.layout, stage)
        seconds = self._layer_forward() * (layers + self._layers_again(layers)) + self._layer_backward() * layers
        if self.layout.recompute == "selective":
            seconds += StageSeconds(compute=self._attention()) * layers
        head = self.head_training() if self._is_last(stage) else 0.0
        return seconds + StageSeconds(compute=head, communication=2 * self._ends(stage))

    def head_forward(self) -> float:
        """Log-probabilities of the targets: one product, and the softmax's traffic."""
        return self._head(products=1, traffic=LOGIT_FORWARD_BYTES)

    def head_training(self) -> float:
        """Log-probabilities and their gradient: three products where the gradient is known beforehand or one block
        holds all logits, otherwise four."""
        known = self.workload.known_gradient
        once = known or self._logits() <= self._model.logprob_chunk_size
        again = 0 if once else LOGIT_AGAIN_BYTES
        seconds = self._head(products=3 if once else 4, traffic=LOGIT_FORWARD_BYTES + LOGIT_GRADIENT_BYTES + again)
        return seconds + self.machine.memory_seconds(self._sums_of_blocks(known_gradient=known))

    def sends(self, busy: StageSeconds, *, passes: int) -> float:
        """What a micro-batch's chunks wait for their neighbours' output: all of it in a plain pipeline, what is longer
        than a chunk's own work in an interleaved one.

        Args:
            busy: the micro-batch's work on the stage.
            passes: 1 forward, 2 forward and backward.
        """
        count = passes * self.layout.virtual_pipeline
        one = pipeline_seconds(self.workload, self.layout, self.machine, self._tokens)
        behind = busy.total / count if self.layout.virtual_pipeline > 1 else 0.0
        return count * exposed(one, behind=behind)

    def _is_last(self, stage: int) -> bool:
        return stage == self.layout.pipeline - 1

    def _logits(self) -> float:
        """Logits of one micro-batch on one rank."""
        return self._targets * padded_vocab_size(self._model, self.layout.tensor) / self.layout.tensor

    def _sums_of_blocks(self, *, known_gradient: bool) -> float:
        """Bytes of adding up the gradients that blocks of logits give: the weight's over blocks of positions, that of
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
        """One product with each linear map of a layer; the layers that FP8 leaves out count by their share."""
        workload, layers = self.workload, self._model.num_layers
        left_out = sum(workload.bf16_layers) / layers if workload.precision == "fp8" else 0.0
        seconds = linear_seconds(workload, self.layout, self.machine, self._local, workload.precision)
        dense = linear_seconds(workload, self.layout, self.machine, self._local, self._dense) if left_out else 0.0
        return (1 - left_out) * seconds + left_out * dense

    def _attention(self) -> float:
        """A forward pass of a layer's core attention, which FP8 does not change."""
        return self.machine.compute_seconds(self._attention_flops / self.layout.tensor, self._dense)

    def _layer_forward(self) -> StageSeconds:
        linear, attention = self._linear(), self._attention()
        traffic = self._local * layer_forward_bytes(self.workload, self.layout)
        return StageSeconds(
            compute=linear + attention + self.machine.memory_seconds(traffic),
            communication=self._tensor(volumes=4, behind=linear) + self._context(passes=1, behind=attention),
        )

    def _layer_backward(self) -> StageSeconds:
        """Two products for each one of the forward pass."""
        linear, attention = 2 * self._linear(), _ATTENTION_BACKWARD * self._attention()
        traffic = self._local * layer_backward_bytes(self.workload, self.layout)
        traffic += gradient_bytes(self.workload, self.layout)
        waited, hidden = (2, 4) if self.layout.sequence_parallel else (0, 4)
        return StageSeconds(
            compute=linear + attention + self.machine.memory_seconds(traffic),
            # Keys and values again, and their gradients.
            communication=self._tensor(volumes=waited, hidden=hidden, behind=linear)
            + self._context(passes=2, behind=attention),
        )

    def _tensor(self, *, volumes: int, hidden: int = 0, behind: float = 0.0) -> float:
        """So many gathers or reduce-scatters that are waited for, and `hidden` ones behind matrix products."""
        one = tensor_seconds(self.workload, self.layout, self.machine, self._local)
        if self.layout.overlap_tensor_comm:
            return exposed((volumes + hidden) * one, behind=behind)
        return volumes * one + exposed(hidden * one, behind=behind)

    def _context(self, *, passes: int, behind: float) -> float:
        one = context_seconds(self.workload, self.layout, self.machine, self._tokens)
        return exposed(passes * one, behind=behind)

    def _ends(self, stage: int) -> float:
        """Embedding and head exchange the residual stream once a pass."""
        ends = (stage == 0) + self._is_last(stage)
        return ends * tensor_seconds(self.workload, self.layout, self.machine, self._local)

    def _layers_again(self, layers: int) -> int:
        """Layers of a stage whose forward pass is computed again."""
        if self.layout.recompute != "full":
            return 0
        if self.layout.recompute_method == "uniform":
            return layers
        chunks = self.layout.virtual_pipeline
        return chunks * min(layers // chunks, self.layout.recompute_num_layers)


def training_time(workload: Workload, layout: Layout, machine: Machine) -> StepTime:
    """Seconds of one optimizer step, without what precedes it in a round of brain."""
    timer = PassTimer(workload, layout, machine)
    stages = range(layout.pipeline)
    busy = [timer.training(stage) for stage in stages]
    parts = _over_pipeline(timer, busy, layout, passes=2)
    if workload.two_pass:
        before = _over_pipeline(timer, [timer.forward(stage) for stage in stages], layout, passes=1)
        parts = {name: seconds + before[name] for name, seconds in parts.items()}
    return StepTime(
        **parts,
        data_communication=max(_data_time(workload, layout, machine, stage, busy[stage].total) for stage in stages),
        optimizer=max(_optimizer_time(workload, layout, machine, stage) for stage in stages),
    )


def forward_seconds(timer: PassTimer) -> float:
    """A forward pass of all of a step's micro-batches through the pipeline."""
    layout = timer.layout
    return sum(
        _over_pipeline(timer, [timer.forward(stage) for stage in range(layout.pipeline)], layout, passes=1).values()
    )


def _over_pipeline(timer: PassTimer, busy: list[StageSeconds], layout: Layout, *, passes: int) -> dict[str, float]:
    """All micro-batches of a step at the pace of the busiest stage, and the bubble (p - 1) / (v m) of that."""
    busiest = max(busy, key=lambda seconds: seconds.total)
    count, sends = layout.num_micro_batches, timer.sends(busiest, passes=passes)
    return {
        "compute": count * busiest.compute,
        "tensor_communication": count * busiest.communication,
        "pipeline_communication": count * sends,
        "bubble": (layout.pipeline - 1) / layout.virtual_pipeline * (busiest.total + sends),
    }


def _data_time(workload: Workload, layout: Layout, machine: Machine, stage: int, micro_batch: float) -> float:
    """Gradients are reduced behind the last micro-batch's backward pass, weights gathered behind the first one's
    forward pass; fully sharded ones behind every pass."""
    parameters = stage_parameters(workload.model, layout, stage, workload.head)
    seconds = data_seconds(workload, layout, machine, parameters, stage=stage)
    if layout.sharded_weights:
        return exposed(seconds, behind=micro_batch * layout.num_micro_batches)
    if layout.overlap_grad_reduce and (layout.overlap_param_gather or not layout.distributed_optimizer):
        return exposed(seconds, behind=micro_batch)
    return seconds


def _optimizer_time(workload: Workload, layout: Layout, machine: Machine, stage: int) -> float:
    parameters = stage_parameters(workload.model, layout, stage, workload.head)
    replicas = layout.data * layout.context
    shard = parameters / replicas if layout.distributed_optimizer or layout.sharded_weights else parameters
    held = shard if layout.sharded_weights else parameters
    return machine.memory_seconds(update_bytes(workload, held, shard))
