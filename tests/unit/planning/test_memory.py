"""Memory estimates: by hand, by property, and against the peak of a training step."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_brain.config.model import ModelConfig
from megatron_brain.models.architecture import resolve
from megatron_brain.planning.memory import PARTS, estimate_memory, pipeline_stage_memory
from megatron_brain.planning.schedule import pipeline_steps
from megatron_brain.planning.workload import Layout, ScoringWork, Workload

TOOLS = Path(__file__).parents[3] / "tools"
SIZES = {
    "num_layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "untie_embeddings_and_output_weights": True,
}
HIDDEN, FFN, VOCAB, TOKENS = 64, 192, 2048, 256
LAYER = HIDDEN * (64 + 2 * 32) + 64 * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN
ENDS = VOCAB * HIDDEN


def workload(stage="sft", precision="fp32", **changes):
    sizes = {name: changes.pop(name) for name in tuple(changes) if name in SIZES or name == "logprob_chunk_size"}
    model = resolve(ModelConfig(**SIZES | sizes), None, "the test")
    lengths = {"prompt_length": 192, "response_length": 64}
    return Workload(**{"stage": stage, "model": model, "precision": precision} | lengths | changes)


def phases(workload, layout=None, *, pipeline_stage=0, impl="local"):
    """By phase, the one that needs most where there are several."""
    found = sorted(
        pipeline_stage_memory(workload, layout or Layout(), pipeline_stage, impl=impl), key=lambda memory: memory.total
    )
    return {memory.phase: memory for memory in found}


def brain(**changes):
    model = resolve(ModelConfig(**SIZES), None, "the test")
    scorers = [
        ScoringWork(name=name, model=model, head=head) for name, head in (("prior", "policy"), ("reward", "reward"))
    ]
    options = {
        "samples_per_prompt": 4,
        "prompts_per_round": 8,
        "sampling_batch_size": 16,
        "frozen_models": tuple(scorers),
    }
    return workload("brain", **options | changes)


@pytest.mark.parametrize(
    ("precision", "layout", "weight", "state"),
    [
        ("fp32", Layout(), 4, 8),
        ("bf16", Layout(), 2, 12),
        ("bf16", Layout(data=4, distributed_optimizer=True), 2, 3),
        ("bf16", Layout(data=4), 2, 12),
    ],
)
def test_bytes_of_a_parameter(precision, layout, weight, state):
    parameters = 8 * LAYER + 2 * ENDS + HIDDEN
    memory = phases(workload(precision=precision), layout)["training"]
    assert (memory.weights, memory.gradients) == (weight * parameters, 4 * parameters)
    assert memory.optimizer == state * parameters


def test_fp8_keeps_two_copies_of_the_linear_maps_beside_or_in_place_of_their_weights():
    matrices = 8 * (LAYER - 2 * HIDDEN)
    weights = {
        name: phases(workload(precision=precision, **options), impl="transformer_engine")["training"].weights
        for name, precision, options in (
            ("bf16", "bf16", {}),
            ("beside", "fp8", {}),
            ("alone", "fp8", {"fp8_param_gather": True}),
            ("ends in bf16", "fp8", {"bf16_layers": (1, 1)}),
        )
    }
    assert weights["beside"] - weights["bf16"] == 2 * matrices
    assert weights["alone"] == weights["bf16"]
    assert weights["ends in bf16"] - weights["bf16"] == 2 * matrices * 6 // 8


def test_a_layer_keeps_what_its_operations_need():
    one, two = (phases(workload(num_layers=layers))["training"].activations for layers in (8, 9))
    stream, query, key = TOKENS * HIDDEN * 4, TOKENS * 64 * 4, TOKENS * 32 * 4
    # RMSNorm twice: input, normalised input, output, one number a token.
    norms = 2 * (3 * stream + TOKENS * 4)
    # The product of queries, keys and values; queries and keys rotated; output; a log-sum-exp for each head.
    attention = (query + 2 * key) + (query + key) + query + TOKENS * 4 * 4
    # Gate and up, and their product.
    feed_forward = 3 * TOKENS * FFN * 4
    assert two - one == norms + attention + feed_forward


def test_full_recompute_keeps_the_inputs_of_layers_alone():
    one, two = (
        phases(workload(num_layers=layers), Layout(recompute="full"))["training"].activations for layers in (8, 9)
    )
    assert two - one == TOKENS * HIDDEN * 4
    assert one < phases(workload())["training"].activations / 2


def test_sequence_parallelism_divides_the_residual_stream_and_needs_a_buffer_to_gather_it():
    def layer(**options):
        one, two = (
            phases(workload(num_layers=layers), Layout(tensor=2, **options))["training"].activations
            for layers in (8, 9)
        )
        return two - one

    assert layer() - layer(sequence_parallel=True) == 2 * (3 * TOKENS * HIDDEN * 4 + TOKENS * 4) // 2


@pytest.mark.parametrize("pipeline_stage", range(4))
def test_a_pipeline_stage_keeps_a_micro_batch_for_every_one_behind_it(pipeline_stage):
    def activations(micro_batches, **options):
        layout = Layout(pipeline=4, num_micro_batches=micro_batches, **options)
        # What all packed micro-batches of a step hold, whether under way or not.
        batches = micro_batches * (TOKENS * 16 + 64 * 25)
        return phases(workload(), layout, pipeline_stage=pipeline_stage)["training"].activations - batches

    one, two, many = activations(1), activations(2), activations(12)
    under_way = 4 - pipeline_stage
    assert many - one == (under_way - 1) * (two - one if under_way > 1 else 0)
    assert two > one or pipeline_stage == 3


@pytest.mark.parametrize(
    ("pipeline_stages", "chunks", "micro_batches"), [(1, 1, 3), (4, 1, 6), (2, 4, 4), (4, 2, 8), (4, 3, 4)]
)
def test_the_schedule_is_that_of_megatron_core(pipeline_stages, chunks, micro_batches):
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, pipeline_stages)]
    for pipeline_stage in range(pipeline_stages):
        steps = list(pipeline_steps(pipeline_stage, pipeline_stages, chunks, micro_batches))
        assert [chunk for direction, chunk in steps if direction == "forward"] == table
        assert [chunk for direction, chunk in steps if direction == "backward"] == [chunks - 1 - c for c in table]
        under_way = 0
        most = 0
        for direction, _ in steps:
            under_way += 1 if direction == "forward" else -1
            most = max(most, under_way)
            assert under_way >= 0
        behind = pipeline_stages - pipeline_stage - 1
        warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * pipeline_stages
        assert most == min(len(table), warm_up + 1)


def test_logits_take_as_much_as_the_chunk_size_allows():
    large, small = (
        phases(workload(logprob_chunk_size=size))["training"].logprob_workspace for size in (2**25, 16 * VOCAB)
    )
    # 64 positions against 16 at a time; gradients and selected states are the same.
    assert large - small == (64 - 16) * VOCAB * 4
    assert phases(workload(stage="reward", samples_per_prompt=2))["training"].logprob_workspace == 0


def test_the_cache_holds_prompts_once_and_responses_but_their_last_token():
    memory = phases(brain())["sampling"]
    places = 4 * 192 + 16 * 63
    assert memory.kv_cache == 8 * 2 * places * 32 * 4
    assert phases(brain(), Layout(tensor=2))["sampling"].kv_cache == memory.kv_cache // 2
    assert phases(brain(), Layout(pipeline=2))["sampling"].kv_cache == memory.kv_cache // 2


def test_held_out_prompts_are_not_shared_in_the_cache():
    assert "validation" not in phases(brain())
    memory = phases(brain(answers_held_out=True))["validation"]
    # Without responses to share a prompt, a full batch holds as many prompts as responses.
    places = 16 * (192 + 63)
    assert memory.kv_cache == 8 * 2 * places * 32 * 4


def test_offloaded_models_are_there_only_while_they_score():
    resident = brain()
    offloaded = dataclasses.replace(
        resident, frozen_models=tuple(dataclasses.replace(model, offloaded=True) for model in resident.frozen_models)
    )
    prior, reward = (4 * (8 * LAYER + ENDS + HIDDEN + head) for head in (ENDS, HIDDEN))
    by_phase = phases(resident)
    assert {memory.frozen_models for memory in by_phase.values()} == {prior + reward}
    by_phase = phases(offloaded)
    assert {by_phase[name].frozen_models for name in ("training", "update", "sampling")} == {0}
    assert by_phase["scoring"].frozen_models in (prior, reward)


def test_the_estimate_is_the_worst_pipeline_stage_in_its_worst_phase_and_its_parts_add_up():
    layout = Layout(tensor=2, pipeline=4, num_micro_batches=8, sequence_parallel=True)
    memory = estimate_memory(brain(precision="bf16"), layout)
    everything = [m for rank in range(4) for m in pipeline_stage_memory(brain(precision="bf16"), layout, rank)]
    assert memory.total == max(m.total for m in everything)
    assert memory.total == sum(memory.as_dict()[part] for part in PARTS)


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"untie_embeddings_and_output_weights": False}, Layout()),
        ({"precision": "bf16"}, Layout()),
        ({}, Layout(recompute="full")),
        ({"stage": "reward", "samples_per_prompt": 2}, Layout()),
    ],
)
def test_the_peak_of_a_training_step_is_the_estimate(single, monkeypatch, options, layout):
    monkeypatch.syspath_prepend(TOOLS)
    from benchmarks import allocations
    from helpers.measured_steps import train_steps

    case = workload(**options)
    # oneDNN, which some processors' bf16 products go through, has scratch memory of its own.
    with torch.backends.mkldnn.flags(enabled=False), allocations.recorded() as found:
        train_steps(case, layout, single)
    # Every part is a good share of the whole: the test would see any of them missing.
    estimate = estimate_memory(case, layout, impl="local")
    assert found.peak == pytest.approx(estimate.total, rel=0.02)
