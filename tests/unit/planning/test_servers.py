"""vLLM servers that draw a round, counted by hand where nothing else takes time."""

import dataclasses

import pytest
from helpers.planning import ideal_machine, small_model

from megatron_brain.config.loader import load_config
from megatron_brain.errors import ConfigError
from megatron_brain.models.architecture import resolve
from megatron_brain.planning.machine import GIB, MACHINES
from megatron_brain.planning.memory import pipeline_stage_memory
from megatron_brain.planning.presets import preset
from megatron_brain.planning.rounds import scoring_seconds, step_time, time_without_drawing
from megatron_brain.planning.servers import (
    MOST_AT_ONCE,
    Servers,
    at_one_time,
    drawing_seconds,
    fastest_servers,
    sync_bytes,
    sync_seconds,
    tensor_sizes,
)
from megatron_brain.planning.sizes import pipeline_stage_parameters, total_parameters
from megatron_brain.planning.time import prompt_timer
from megatron_brain.planning.traffic import layer_forward_bytes
from megatron_brain.planning.workload import Layout, Workload, from_run_config

LINEAR = 8 * (8 + 2 * 4) + 8 * 8 + 3 * 8 * 16
OUTPUTS = (8 + 2 * 4) + 8 + 2 * 16 + 8
INPUTS = 8 + 8 + 8 + 16
H100 = MACHINES["h100"]


def brain(**changes):
    """6 groups of 6 + 2 x 4 tokens."""
    sizes = {"model": small_model(), "prompt_length": 6, "response_length": 4, "samples_per_prompt": 2}
    sizes |= {"prompts_per_round": 6, "drawn_by_servers": True}
    return Workload(stage="brain", **sizes | changes)


def test_a_token_round_reads_weights_once_and_the_cache_of_every_response_by_hand():
    """Two servers with both responses to 3 of 6 prompts each: 6 rows. In each of 4 layers each row reads 6 + 2 tokens
    of 2 x 4 numbers in bf16; unlike in our sampler, a prompt's part is read by each of its responses. The choice takes
    62 bytes a logit and reads the output layer."""
    workload = brain()
    machine = ideal_machine(memory_bandwidth=1.0)
    linear = 2 * (LINEAR + 6 * (INPUTS + OUTPUTS))
    layers = 4 * (linear + 6 * (6 + 2) * 8 * 2 + 6 * layer_forward_bytes(workload, Layout()))
    choice = 2 * 8 * 32 + 6 * 32 * 62
    prompts = prompt_timer(workload, Layout(), machine, 3).forward(0).total
    assert drawing_seconds(workload, Servers(count=2, tensor=1), machine) == prompts + 3 * layers + 4 * choice


def test_prompts_are_computed_once_for_all_their_responses_by_hand():
    """6 prompts of 6 tokens with 21 pairs, then 12 rows for 3 tokens in the layers and 4 in the head."""
    seconds = drawing_seconds(brain(), Servers(count=1, tensor=1), ideal_machine(bf16_flops=1.0))
    prompts = 4 * 6 * (2 * 6 * LINEAR + 4 * 21 * 8)
    attention = 4 * 12 * (6 + 2) * 8
    assert seconds == prompts + 3 * 4 * (2 * 12 * LINEAR + attention) + 4 * 2 * 12 * 8 * 32


def test_places_stay_full_until_a_round_is_drawn():
    """With room for a third of the responses there are three times as many token rounds, of a third of the rows."""
    workload = brain(prompts_per_round=12)
    machine = ideal_machine(memory_bandwidth=1.0)
    whole, servers = drawing_seconds(workload, Servers(count=1, tensor=1), machine), Servers(count=1, tensor=1)
    third = drawing_seconds(dataclasses.replace(workload, prompts_per_round=4), servers, machine)
    each = 2 * 8 * 4 * 2 * (6 / 2 + 4)  # bytes of a response: two heads' channels, 4 layers, half a prompt and 4 tokens
    weights = 2 * pipeline_stage_parameters(workload.model, Layout(), 0)
    room = dataclasses.replace(machine, memory_bytes=int((4 * GIB + weights + 8 * each / 2) / 0.9) + 2)
    assert at_one_time(workload, servers, room) == 8
    prompts = [prompt_timer(workload, Layout(), machine, n).forward(0).total for n in (12, 4)]
    assert drawing_seconds(workload, servers, room) == pytest.approx(prompts[0] + 3 * (third - prompts[1]))
    assert drawing_seconds(workload, servers, room) > whole


def test_no_more_responses_are_drawn_at_one_time_than_vllm_allows():
    assert at_one_time(brain(prompts_per_round=10**6), Servers(count=1, tensor=1), ideal_machine()) == MOST_AT_ONCE


def test_a_server_that_does_not_hold_the_weights_is_refused():
    workload = brain(model=preset("llama3-70b"), prompt_length=1024, response_length=512)
    with pytest.raises(ConfigError, match="no room for a response .* larger tensor-parallel size"):
        drawing_seconds(workload, Servers(count=1, tensor=1), H100)
    assert fastest_servers(workload, H100, gpus=8, tensor=None).tensor >= 4
    with pytest.raises(ConfigError, match="engine_gpus=3 are no whole number of servers"):
        fastest_servers(workload, H100, gpus=3, tensor=None)


def test_tensor_parallel_sizes_divide_heads_and_nodes():
    assert tensor_sizes(preset("llama3-8b"), H100) == [1, 2, 4, 8]
    nine = small_model(num_attention_heads=9, num_query_groups=3, kv_channels=8)
    assert tensor_sizes(nine, H100) == [1]


def test_a_sync_is_written_in_equal_parts_and_read_whole_by_every_node():
    """16 GPUs on 2 nodes write; bf16, and the tied output layer once more."""
    model = small_model(untie_embeddings_and_output_weights=False, bf16=True)
    size = 2 * (total_parameters(model) + 32 * 8)
    assert sync_bytes(model) == size == sync_bytes(dataclasses.replace(model, bf16=False)) / 2
    machine = ideal_machine(storage_bandwidth=4.0)
    layout, servers = Layout(tensor=2, data=8), Servers(count=3, tensor=2)
    assert sync_seconds(brain(model=model), layout, servers, machine) == (size / 2 / 4, size / 4)
    slow_host = dataclasses.replace(machine, host_bandwidth=1.0)
    assert sync_seconds(brain(model=model), layout, servers, slow_host)[1] == size / 4 + size / 2


@pytest.mark.parametrize("count", [1, 100])
def test_rounds_ahead_cost_the_sync_and_the_longer_of_sampling_and_training(count):
    model = preset("llama3-8b")
    sizes = {"model": model, "prompt_length": 512, "response_length": 256, "samples_per_prompt": 8}
    workload = brain(**sizes, prompts_per_round=400, global_batch_size=100, steps_per_round=4)
    layout, servers = (
        Layout(tensor=2, data=4, sequence_parallel=True, num_micro_batches=25),
        Servers(count=count, tensor=1),
    )
    drawing = drawing_seconds(workload, servers, H100)
    sync = sum(sync_seconds(workload, layout, servers, H100))
    training = time_without_drawing(workload, layout, H100)
    assert (drawing > 4 * training.total) == (count == 1)  # one server is slower than training, a hundred are faster

    waiting = step_time(workload, layout, H100, servers)
    assert 4 * waiting.total == pytest.approx(drawing + sync + 4 * training.total)
    ahead = dataclasses.replace(workload, rounds_ahead=1)
    busy = time_without_drawing(ahead, layout, H100).total
    assert 4 * step_time(ahead, layout, H100, servers).total == pytest.approx(sync + max(drawing, 4 * busy))


def test_a_round_drawn_ahead_is_scored_by_a_copy_from_host_memory():
    """The policy's pass over the samples is one of the copy instead; its weights come from the host once a round."""
    argv = ["--train-data", "d", "--load", "p", "--finetune", "--reward-load", "r", "--bf16", "--vocab-size", "64"]
    argv += [
        "--num-layers",
        "2",
        "--hidden-size",
        "64",
        "--num-attention-heads",
        "4",
        "--ffn-hidden-size",
        "96",
        "--seq-length",
        "64",
    ]
    argv += ["--max-new-tokens", "16", "--max-position-embeddings", "64", "--samples-per-prompt", "2"]
    servers = ["--engine", "vllm", "--engine-url", "http://a:1", "--engine-sync-dir", "s"]

    def planned(*more):
        config = load_config("brain", [*argv, *more])
        config = dataclasses.replace(config, model=resolve(config.model, None, "the test"))
        return from_run_config(config, 1)

    (native, layout), (waits, _), (ahead, _) = planned(), planned(*servers), planned(*servers, "--rounds-ahead", "1")
    assert [w.drawn_by_servers for w in (native, waits, ahead)] == [False, True, True]
    assert [model.name for model in waits.frozen_models] == ["prior", "reward"]
    assert [model.name for model in ahead.frozen_models] == ["prior", "reward", "proposal"]
    only_host = ideal_machine(host_bandwidth=1.0)
    assert scoring_seconds(waits, layout, only_host) == 0
    copied = 2 * pipeline_stage_parameters(ahead.model, layout, 0)
    assert scoring_seconds(ahead, layout, only_host) == copied
    compute = ideal_machine(bf16_flops=1.0)
    assert scoring_seconds(ahead, layout, compute) == scoring_seconds(waits, layout, compute)
    phases = [{memory.phase for memory in pipeline_stage_memory(w, layout, 0)} for w in (native, waits)]
    assert phases[0] - phases[1] == {"sampling"}
