"""Seconds of a step: each part is what is counted by hand where nothing else takes time."""

import dataclasses

import pytest
from helpers.planning import RATES, ideal_machine, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_brain.models.logit_blocks import block_shape
from megatron_brain.planning.communication import ring_share, tensor_volume
from megatron_brain.planning.machine import MACHINES
from megatron_brain.planning.presets import preset
from megatron_brain.planning.schedule import pipeline_steps
from megatron_brain.planning.sizes import layer_parameters, model_flops, pipeline_stage_parameters
from megatron_brain.planning.time import training_time
from megatron_brain.planning.traffic import layer_backward_bytes, layer_forward_bytes
from megatron_brain.planning.workload import Layout, Workload

LINEAR = 8 * (8 + 2 * 4) + 8 * 8 + 3 * 8 * 16
"""Weights of a layer's linear maps in `small_model`."""


def pretraining(**changes):
    """Sequences of 10 tokens, all of them predicted."""
    sizes = {"stage": "sft", "model": small_model(), "prompt_length": 0, "response_length": 10, "seq_length": 10}
    return Workload(**sizes | changes)


def test_compute_of_one_gpu_is_the_models_operations():
    workload = pretraining(global_batch_size=6)
    time = training_time(workload, Layout(num_micro_batches=6), ideal_machine(bf16_flops=1.0))
    # Attention's backward pass computes the scores again: 2.5 times the forward pass, where the model needs 2.
    again = 4 * 0.5 * 4 * 55 * 8
    expected = 6 * (model_flops(workload.model, workload.segments, 10) + again)
    assert time.compute == time.total == expected


def test_fp8_is_for_linear_maps_alone():
    workload = pretraining(precision="fp8")
    linear = training_time(workload, Layout(), ideal_machine(fp8_flops=1.0)).compute
    rest = training_time(workload, Layout(), ideal_machine(bf16_flops=1.0)).compute
    assert linear == 4 * 3 * 2 * 10 * LINEAR
    assert rest == 3 * 2 * 10 * 8 * 32 + 4 * 3.5 * 4 * 55 * 8
    half = training_time(
        dataclasses.replace(workload, bf16_layers=(1, 1)), Layout(), ideal_machine(fp8_flops=1.0)
    ).compute
    assert half == linear / 2


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        ({"recompute": "selective"}, 4 * 4 * 55 * 8),
        ({"recompute": "full"}, 4 * (2 * 10 * LINEAR + 4 * 55 * 8)),
        ({"recompute": "full", "recompute_method": "block", "recompute_num_layers": 3}, 3 * (20 * LINEAR + 220 * 8)),
        # Of each of two chunks of two layers.
        (
            {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 3, "virtual_pipeline": 2},
            4 * (20 * LINEAR + 220 * 8),
        ),
        (
            {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 1, "virtual_pipeline": 2},
            2 * (20 * LINEAR + 220 * 8),
        ),
    ],
)
def test_recomputation_adds_what_it_computes_again(recompute, again):
    machine = ideal_machine(bf16_flops=1.0)
    plain = training_time(pretraining(), Layout(), machine).compute
    assert training_time(pretraining(), Layout(**recompute), machine).compute == plain + again


@pytest.mark.parametrize(
    ("two_pass", "chunk", "products"),
    [(False, 10**9, 3), (False, 8, 4), (True, 8, 1 + 3)],
)
def test_head_takes_three_products_four_or_one_more(two_pass, chunk, products):
    """3 where one block holds all logits, 4 where they are computed again; known beforehand 3 after a pass of 1."""
    model = small_model(logprob_chunk_size=chunk)
    group = {"prompt_length": 6, "response_length": 4, "samples_per_prompt": 2}
    workload = Workload(stage="brain", model=model, two_pass=two_pass, **group)
    half = dataclasses.replace(workload, model=dataclasses.replace(model, vocab_size=16))
    machine = ideal_machine(bf16_flops=1.0)
    times = [training_time(work, Layout(), machine).compute for work in (workload, half)]
    assert times[0] - times[1] == products * 2 * 8 * 8 * 16


def test_gradients_of_blocks_of_logits_are_added_up():
    """10 positions, 32 ids, hidden size 8. Blocks of 2 whole rows add the weight's gradient 5 times, known beforehand;
    computed again, blocks of 8 positions and 8 ids add it twice, and that of the hidden states 4 times."""
    machine = ideal_machine(memory_bandwidth=1.0)

    def more(chunk: int, again: int, **changes) -> float:
        whole, cut = (
            training_time(pretraining(model=small_model(logprob_chunk_size=size), **changes), Layout(), machine).compute
            for size in (10**9, chunk)
        )
        return cut - whole - again * 10 * 32

    assert more(64, 0) == 5 * 32 * 8 * (8 + 4)
    assert more(64, 0, precision="fp32") == 5 * 32 * 8 * 8
    group = {"stage": "brain", "seq_length": None}
    assert block_shape(10, 32, 64) == (8, 8)
    assert more(64, 24, **group) == (2 * 32 + 4 * 10) * 8 * (8 + 4)


def test_a_shared_prefix_computes_a_prompt_once():
    group = {"prompt_length": 100, "response_length": 10, "samples_per_prompt": 4}
    machine = ideal_machine(bf16_flops=1.0)
    shared, copied = (
        training_time(
            Workload(stage="brain", model=small_model(), shared_prefix=is_shared, **group), Layout(), machine
        ).compute
        for is_shared in (True, False)
    )
    saved_pairs = 3 * 100 * 101 / 2
    assert copied - shared == 4 * (3 * 2 * 300 * LINEAR + 3.5 * 4 * saved_pairs * 8)


@pytest.mark.parametrize(("sequence_parallel", "of_a_layer"), [(True, 4 + 2 + 4), (False, 4 + 4)])
def test_tensor_parallel_communication_by_hand(sequence_parallel, of_a_layer):
    """A rank of 4 sends 3/4 of 12 tokens (10 and padding) x 8 channels x 2 bytes in a gather or reduce-scatter. With
    sequence parallelism two inputs are gathered again in the backward pass. No product hides any of it here."""
    layout = Layout(tensor=4, sequence_parallel=sequence_parallel)
    assert tensor_volume(pretraining(), layout, 12) == 144
    time = training_time(pretraining(), layout, ideal_machine(node_bandwidth=1.0))
    ends = 2 * 2
    assert time.tensor_communication == 144 * (4 * of_a_layer + ends)


@pytest.mark.parametrize(("sequence_parallel", "of_a_layer"), [(True, 4 + 2), (False, 4)])
def test_what_goes_on_behind_longer_products_costs_nothing(sequence_parallel, of_a_layer):
    """Of the backward pass only the gradients of the two outputs are waited for, which are whole without sequence
    parallelism."""
    layout = Layout(tensor=4, sequence_parallel=sequence_parallel)
    time = training_time(pretraining(), layout, ideal_machine(node_bandwidth=1.0, bf16_flops=1.0))
    assert time.tensor_communication == 144 * (4 * of_a_layer + 2 * 2)


def test_pipeline_sends_hidden_states_and_their_gradients_by_hand():
    """A plain pipeline waits for them; an interleaved one only for what is longer than a chunk's work."""
    machine = ideal_machine(node_bandwidth=1.0)
    workload = pretraining(global_batch_size=4)
    plain = training_time(workload, Layout(pipeline=2, num_micro_batches=4), machine)
    assert plain.pipeline_communication == 4 * 2 * 10 * 8 * 2
    interleaved = Layout(pipeline=2, virtual_pipeline=2, num_micro_batches=4)
    assert training_time(workload, interleaved, machine).pipeline_communication == 2 * plain.pipeline_communication
    with_work = ideal_machine(node_bandwidth=1.0, bf16_flops=1.0)
    assert training_time(workload, interleaved, with_work).pipeline_communication == 0.0


@pytest.mark.parametrize(
    ("layout", "bytes_per_parameter"),
    [({"distributed_optimizer": True}, 4 + 2), ({}, 2 * 4), ({"sharded_weights": True}, 3 * (2 + 2 + 4))],
)
def test_data_parallel_communication_by_hand(layout, bytes_per_parameter):
    workload = pretraining(global_batch_size=12)
    time = training_time(workload, Layout(data=4, num_micro_batches=3, **layout), ideal_machine(node_bandwidth=1.0))
    assert time.data_communication == 0.75 * bytes_per_parameter * pipeline_stage_parameters(
        workload.model, Layout(), 0
    )


@pytest.mark.parametrize(("data", "bandwidth"), [(1, 450), (2, 450), (4, 50)])
def test_stages_go_at_the_pace_of_the_hop_that_leaves_a_node(data, bandwidth):
    """On 4 and 8 GPUs of a node, and on 16: most hops stay in a node of 8 then, and do not help."""
    machine = ideal_machine(node_bandwidth=450.0, network_bandwidth=50.0)
    layout = Layout(pipeline=4, data=data, num_micro_batches=4)
    time = training_time(pretraining(global_batch_size=4 * data), layout, machine)
    assert time.pipeline_communication == pytest.approx(4 * 2 * 10 * 8 * 2 / bandwidth)


def test_overlapped_reduction_costs_what_is_longer_than_a_micro_batch():
    workload = pretraining(global_batch_size=12)
    overlapped = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    layout = Layout(data=4, num_micro_batches=3, **overlapped)
    slow, work = ideal_machine(node_bandwidth=1.0), ideal_machine(node_bandwidth=1.0, bf16_flops=1.0)
    whole = training_time(workload, layout, slow).data_communication
    busy = training_time(workload, layout, work)
    assert busy.data_communication == max(0.0, whole - busy.compute / 3)


@pytest.mark.parametrize(
    ("size", "stride", "bandwidth"),
    [
        (8, 1, 450),  # one node
        (2, 4, 450),  # still one node
        (4, 4, 2 * 50),  # two of each group in a node: they share what leaves it
        (4, 8, 50),
        (16, 1, 8 * 50),
    ],
)
def test_bandwidth_of_a_ring_by_hand(size, stride, bandwidth):
    machine = ideal_machine(node_bandwidth=450, network_bandwidth=50)
    assert machine.group_bandwidth(size, stride) == bandwidth
    assert ring_share(size) == 1 - 1 / size


def test_memory_traffic_of_a_layer_and_of_a_logit_by_hand():
    """A token of `small_model`: stream 8 wide, qkv 8 + 4 + 4, fc1 32, fc2 16."""
    bf16, fp8 = pretraining(), pretraining(precision="fp8")
    assert layer_forward_bytes(bf16, Layout()) == 2 * (10 * 8 + 2 * (8 + 4) + (32 + 16))
    assert layer_backward_bytes(bf16, Layout()) == 2 * (12 * 8 + 2 * (8 + 4) + (2 * 32 + 16))
    assert layer_forward_bytes(fp8, Layout()) - layer_forward_bytes(bf16, Layout()) == 4 * (8 + 8 + 8 + 16)
    assert layer_backward_bytes(fp8, Layout()) - layer_backward_bytes(bf16, Layout()) == 4 * (16 + 8 + 32 + 8)
    split = Layout(tensor=2, sequence_parallel=True)
    assert layer_forward_bytes(bf16, split) == layer_forward_bytes(bf16, Layout()) / 2
    more = pretraining(model=small_model(vocab_size=64))
    machine = ideal_machine(memory_bandwidth=1.0)
    times = [training_time(workload, Layout(), machine).compute for workload in (more, bf16)]
    assert times[0] - times[1] == 10 * 32 * (32 + 18)


def test_gradients_are_added_to_the_buffer_by_every_micro_batch():
    """8 bytes of traffic a parameter where the product does it; without fusion bf16 is written and read on the way."""
    machine = ideal_machine(memory_bandwidth=1.0)
    times = {
        fused: training_time(
            pretraining(global_batch_size=5), Layout(num_micro_batches=5, gradient_accumulation_fusion=fused), machine
        ).compute
        for fused in (True, False)
    }
    assert times[False] - times[True] == 5 * 4 * 4 * layer_parameters(small_model())


def test_optimizer_traffic_is_split_over_replicas():
    parameters = pipeline_stage_parameters(small_model(), Layout(), 0)
    machine = ideal_machine(memory_bandwidth=1.0)
    whole = training_time(pretraining(), Layout(data=4), machine).optimizer
    split = training_time(pretraining(), Layout(data=4, distributed_optimizer=True), machine).optimizer
    assert whole == parameters * (4 + 40 + 2)
    assert split == parameters * (4 + (40 + 2) / 4)


def makespan(pipeline_stages, chunks, count, forward=1.0, backward=2.0):
    """Time of a step of passes that wait only for their neighbours, from the schedule that memory is estimated with."""
    ranks = range(pipeline_stages)
    queues = [list(pipeline_steps(rank, pipeline_stages, chunks, count)) for rank in ranks]
    last = pipeline_stages * chunks - 1
    done, clock, seen = {}, [0.0 for _ in ranks], [{} for _ in ranks]
    while any(queues):
        for rank, queue in enumerate(queues):
            while queue:
                direction, chunk = queue[0]
                number, place = seen[rank].get(queue[0], 0), chunk * pipeline_stages + rank
                if direction == "forward":
                    before = ("forward", place - 1, number) if place else None
                else:
                    before = ("backward", place + 1, number) if place < last else ("forward", place, number)
                if before is not None and before not in done:
                    break
                start = max(clock[rank], done.get(before, 0.0))
                clock[rank] = start + (forward if direction == "forward" else backward) / chunks
                done[direction, place, number] = clock[rank]
                seen[rank][queue.pop(0)] = number + 1
    return max(clock)


@pytest.mark.parametrize(
    ("pipeline_stages", "chunks", "count"), [(2, 1, 4), (4, 1, 8), (4, 2, 8), (8, 5, 16), (3, 4, 6)]
)
def test_the_bubble_is_that_of_the_schedule(pipeline_stages, chunks, count):
    """(p - 1) / (v m) of the busy time, as a simulation of the schedule has it."""
    # A reward model: its head takes no time, so all pipeline stages are alike.
    model = small_model(num_layers=pipeline_stages * chunks)
    workload = Workload(stage="reward", model=model, prompt_length=6, response_length=4, samples_per_prompt=2)
    layout = Layout(pipeline=pipeline_stages, virtual_pipeline=chunks, num_micro_batches=count)
    time = training_time(workload, layout, ideal_machine(bf16_flops=1.0))
    busy = 3.0 * count
    assert time.bubble / time.compute == pytest.approx((makespan(pipeline_stages, chunks, count) - busy) / busy)


LAYOUTS = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4]),
    virtual_pipeline=st.sampled_from([1, 2]),
    data=st.sampled_from([1, 2, 16]),
    num_micro_batches=st.sampled_from([4, 8]),
    sequence_parallel=st.booleans(),
    distributed_optimizer=st.booleans(),
    recompute=st.sampled_from(["none", "selective", "full"]),
)


@given(layout=LAYOUTS, rate=st.sampled_from(RATES), precision=st.sampled_from(["bf16", "fp8", "fp32"]))
@settings(max_examples=60, deadline=None)
def test_no_faster_part_makes_a_step_slower_and_efficiency_scales_all(layout, rate, precision):
    workload = Workload(
        stage="brain", model=preset("llama3-8b"), prompt_length=500, response_length=100, precision=precision
    )
    machine = MACHINES["h100"]
    total = training_time(workload, layout, machine).total
    faster = dataclasses.replace(machine, **{rate: 2 * getattr(machine, rate)})
    assert training_time(workload, layout, faster).total <= total
    half = dataclasses.replace(machine, efficiency=machine.efficiency / 2)
    assert training_time(workload, layout, half).total == pytest.approx(2 * total)


@given(layout=LAYOUTS)
@settings(max_examples=40, deadline=None)
def test_more_work_takes_longer(layout):
    workload = Workload(
        stage="brain", model=preset("llama3-8b"), prompt_length=512, response_length=128, samples_per_prompt=4
    )
    total = training_time(workload, layout, MACHINES["h100"]).total
    for change in ({"prompt_length": 1024}, {"response_length": 256}, {"samples_per_prompt": 8}):
        assert training_time(dataclasses.replace(workload, **change), layout, MACHINES["h100"]).total > total
    more = dataclasses.replace(layout, num_micro_batches=2 * layout.num_micro_batches)
    assert training_time(workload, more, MACHINES["h100"]).total > total
    order = ("none", "selective", "full")
    again = [
        training_time(workload, dataclasses.replace(layout, recompute=kind), MACHINES["h100"]).total for kind in order
    ]
    assert again == sorted(again)
