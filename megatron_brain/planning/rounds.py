"""Seconds of a step of any stage: training, and in brain also a step's share of sampling and scoring a round."""

import dataclasses
import math

from megatron_brain.models.architecture import padded_vocab_size
from megatron_brain.planning.communication import exposed, pipeline_seconds, tensor_seconds
from megatron_brain.planning.machine import Machine
from megatron_brain.planning.servers import Servers, drawing_seconds, sync_seconds
from megatron_brain.planning.sizes import pipeline_stage_parameters
from megatron_brain.planning.time import (
    PassTimer,
    StepTime,
    forward_seconds,
    linear_seconds,
    prompt_timer,
    training_time,
)
from megatron_brain.planning.traffic import (
    CHOICE_BYTES,
    SCORE_BYTES,
    bytes_per_value,
    cache_bytes_per_value,
    key_value_width,
    layer_forward_bytes,
)
from megatron_brain.planning.workload import Layout, Precision, ScoringWork, Workload


def step_time(workload: Workload, layout: Layout, machine: Machine, servers: Servers | None = None) -> StepTime:
    """Seconds of one optimizer step with its share of a round.

    Servers first take over the weights, for which the run waits. Then they draw: this round, for which it waits too, or
    with rounds ahead the next one, while this one is scored and trained on.

    Args:
        servers: what draws the responses; None: the GPUs of the run, or nothing.
    """
    assert workload.drawn_by_servers == (servers is not None)
    step = time_without_drawing(workload, layout, machine)
    share = 1 / workload.steps_per_round
    if servers is not None:
        drawing = share * drawing_seconds(workload, servers, machine)
        hidden = step.total if workload.rounds_ahead else 0.0
        sync = share * sum(sync_seconds(workload, layout, servers, machine))
        return dataclasses.replace(step, sampling=exposed(drawing, behind=hidden), sync=sync)
    if workload.spec.rounds and workload.generates:
        return dataclasses.replace(step, sampling=share * sampling_seconds(workload, layout, machine))
    return step


def time_without_drawing(workload: Workload, layout: Layout, machine: Machine) -> StepTime:
    """Seconds of one optimizer step with its share of scoring a round, but not of drawing it."""
    step = training_time(workload, layout, machine)
    if not workload.spec.rounds:
        return step
    return dataclasses.replace(step, scoring=scoring_seconds(workload, layout, machine) / workload.steps_per_round)


def sampling_seconds(workload: Workload, layout: Layout, machine: Machine) -> float:
    """Seconds to draw the responses of a round: batches go one after another through all pipeline stages, without
    overlap. A model that trains in FP8 samples in bf16."""
    if workload.precision == "fp8":
        workload = dataclasses.replace(workload, precision="bf16")
    batches, prompts = sampling_batches(workload, layout)
    one = _prefill_seconds(workload, layout, machine, prompts)
    # Each response is drawn to its end; its last token is never fed back.
    one += (workload.response_length - 1) * token_seconds(workload, layout, machine, prompts)
    one += workload.response_length * _choice_seconds(workload, layout, machine, prompts)
    return batches * one


def sampling_batches(workload: Workload, layout: Layout) -> tuple[int, int]:
    """Number of batches of a round on one replica, and of prompts in each."""
    mine = math.ceil(workload.prompts_per_round / layout.data)
    at_once = max(1, workload.sampling_batch_size // workload.drawn_per_prompt)
    batches = math.ceil(mine / at_once)
    return batches, math.ceil(mine / batches)


def token_seconds(workload: Workload, layout: Layout, machine: Machine, prompts: int) -> float:
    """Seconds of one token of every response of a batch through all layers, halfway through the responses."""
    rows = prompts * workload.drawn_per_prompt
    linear = linear_seconds(workload, layout, machine, rows, workload.precision)
    traffic = machine.memory_seconds(rows * layer_forward_bytes(workload, layout))
    communication = 4 * tensor_seconds(workload, layout, machine, rows)
    layer = linear + traffic + communication + _cached_attention_seconds(workload, layout, machine, prompts)
    return workload.model.num_layers * layer + _between_pipeline_stages(workload, layout, machine, rows)


def _cached_attention_seconds(workload: Workload, layout: Layout, machine: Machine, prompts: int) -> float:
    """Seconds of one layer's attention of a token to the cache. Keys and values of a prompt are read once for all its
    responses; scores and products are float32."""
    model, rows = workload.model, prompts * workload.drawn_per_prompt
    own = workload.response_length / 2
    stored = prompts * workload.prompt_length + rows * own
    scores = rows * (workload.prompt_length + own) * model.num_attention_heads / layout.tensor
    size = stored * key_value_width(model, layout.tensor) * cache_bytes_per_value(workload) + scores * SCORE_BYTES
    flops = 4 * scores * model.kv_channels
    return max(machine.memory_seconds(size), machine.compute_seconds(flops, "fp32"))


def _choice_seconds(workload: Workload, layout: Layout, machine: Machine, prompts: int) -> float:
    """Seconds of a rank's share of the logits of a batch's next tokens, and of the choice from them."""
    rows = prompts * workload.drawn_per_prompt
    vocabulary = padded_vocab_size(workload.model, layout.tensor) / layout.tensor
    weights = vocabulary * workload.model.hidden_size
    precision: Precision = "fp32" if workload.precision == "fp32" else "bf16"
    product = max(
        machine.compute_seconds(2 * rows * weights, precision),
        machine.memory_seconds(weights * bytes_per_value(workload)),
    )
    return product + machine.memory_seconds(rows * vocabulary * CHOICE_BYTES)


def _prefill_seconds(workload: Workload, layout: Layout, machine: Machine, prompts: int) -> float:
    """Seconds of a forward pass of a batch's prompts, without the head."""
    timer = prompt_timer(workload, layout, machine, prompts)
    tokens = timer.workload.micro_batch_tokens(timer.layout)
    passes = sum(timer.forward(pipeline_stage).total for pipeline_stage in range(layout.pipeline))
    return passes + _between_pipeline_stages(workload, layout, machine, tokens)


def _between_pipeline_stages(workload: Workload, layout: Layout, machine: Machine, tokens: float) -> float:
    """Seconds to send hidden states of `tokens` from chunk to chunk, through all of them."""
    hops = layout.pipeline * layout.virtual_pipeline - 1
    return hops * pipeline_seconds(workload, layout, machine, tokens)


def scoring_seconds(workload: Workload, layout: Layout, machine: Machine) -> float:
    """Seconds of a round's forward passes, in the micro-batches of training: those of the policy where it is the
    proposal, and of every scoring model, whose weights may first come from host memory. Only the reward model scores
    all candidates, before responses are chosen from them."""
    steps = workload.prompts_per_round / workload.global_batch_size
    is_proposal = workload.generates and workload.candidates_per_prompt is None and not workload.rounds_ahead
    policy = forward_seconds(PassTimer(workload, layout, machine)) if is_proposal else 0.0
    candidates = workload.drawn_per_prompt / workload.samples_per_prompt
    return steps * policy + sum(
        (candidates if frozen.head == "reward" else 1) * steps * _frozen_pass(frozen, workload, layout, machine)
        + _loading(frozen, workload, layout, machine)
        for frozen in workload.frozen_models
    )


def _frozen_pass(frozen: ScoringWork, workload: Workload, layout: Layout, machine: Machine) -> float:
    with_its_sizes = dataclasses.replace(workload, model=frozen.model)
    return forward_seconds(PassTimer(with_its_sizes, layout, machine, head=frozen.head))


def _loading(frozen: ScoringWork, workload: Workload, layout: Layout, machine: Machine) -> float:
    if not frozen.offloaded:
        return 0.0
    most = max(pipeline_stage_parameters(frozen.model, layout, one, frozen.head) for one in range(layout.pipeline))
    return machine.host_seconds(most * bytes_per_value(workload))
