"""Sampling and scoring of a round, counted by hand where nothing else takes time."""

import dataclasses

import pytest
from helpers.planning import ideal_machine, small_model

from megatron_brain.planning.machine import MACHINES
from megatron_brain.planning.presets import preset
from megatron_brain.planning.rounds import sampling_batches, sampling_seconds, scoring_seconds, step_time, token_seconds
from megatron_brain.planning.sizes import pipeline_stage_parameters
from megatron_brain.planning.time import training_time
from megatron_brain.planning.traffic import layer_forward_bytes
from megatron_brain.planning.workload import Layout, ScoringWork, Workload

LINEAR = 8 * (8 + 2 * 4) + 8 * 8 + 3 * 8 * 16
OUTPUTS = (8 + 2 * 4) + 8 + 2 * 16 + 8
INPUTS = 8 + 8 + 8 + 16


def brain(**changes):
    """Groups of 6 + 2 x 4 tokens."""
    sizes = {"model": small_model(), "prompt_length": 6, "response_length": 4, "samples_per_prompt": 2}
    return Workload(stage="brain", **sizes | changes)


def test_a_token_reads_weights_and_cache_once_by_hand():
    """3 prompts with 2 responses: 6 rows, a cache of 3 x 6 + 6 x 2 tokens of 2 x 4 numbers, of 10 bytes of traffic;
    each row has a score of each of 2 heads with 6 + 2 tokens, of 24 bytes."""
    workload = brain()
    seconds = token_seconds(workload, Layout(), ideal_machine(memory_bandwidth=1.0), prompts=3)
    linear = 2 * (LINEAR + 6 * (INPUTS + OUTPUTS))
    cache = (3 * 6 + 6 * 2) * 8 * 10
    scores = 6 * (6 + 2) * 2 * 24
    assert seconds == 4 * (linear + cache + scores + 6 * layer_forward_bytes(workload, Layout()))


def test_a_prompts_cache_is_read_once_for_all_its_responses():
    machine = ideal_machine(memory_bandwidth=1.0)

    def longer_prompt_costs(samples):
        short, long = brain(samples_per_prompt=samples), brain(samples_per_prompt=samples, prompt_length=1006)
        scores = 4 * 3 * samples * 1000 * 2 * 24
        return token_seconds(long, Layout(), machine, 3) - token_seconds(short, Layout(), machine, 3) - scores

    assert longer_prompt_costs(16) == longer_prompt_costs(2) == 4 * 3 * 1000 * 8 * 10


def test_prompts_are_computed_once_and_tokens_through_all_pipeline_stages():
    workload = brain(prompts_per_round=3, sampling_batch_size=6)
    machine = ideal_machine(bf16_flops=1.0)
    prompts = 4 * (2 * 18 * LINEAR + 3 * 4 * 21 * 8)
    tokens = 3 * 4 * 2 * 6 * LINEAR
    choices = 4 * 2 * 6 * 8 * 32
    for layout in (Layout(), Layout(pipeline=2), Layout(pipeline=2, virtual_pipeline=2)):
        assert sampling_seconds(workload, layout, machine) == prompts + tokens + choices


def test_hidden_states_go_from_chunk_to_chunk():
    workload = brain(prompts_per_round=3, sampling_batch_size=6)
    machine = ideal_machine(node_bandwidth=1.0)
    layout = Layout(pipeline=2, virtual_pipeline=2)
    assert sampling_seconds(workload, layout, machine) == 3 * 8 * 2 * (3 * 6 + 3 * 6)


@pytest.mark.parametrize(
    ("size", "data", "expected"), [(64, 1, (1, 10)), (6, 1, (4, 3)), (1, 1, (10, 1)), (64, 4, (1, 3)), (4, 4, (2, 2))]
)
def test_batches_hold_whole_prompts(size, data, expected):
    workload = brain(prompts_per_round=10, sampling_batch_size=size)
    assert sampling_batches(workload, Layout(data=data)) == expected


def test_a_model_that_trains_in_fp8_samples_in_bf16():
    layout = Layout(tensor=8, sequence_parallel=True)
    sizes = {"prompts_per_round": 8, "prompt_length": 512, "response_length": 128}
    bf16, fp8 = (
        sampling_seconds(brain(model=preset("llama3-8b"), precision=precision, **sizes), layout, MACHINES["h100"])
        for precision in ("bf16", "fp8")
    )
    assert bf16 == fp8


def test_scoring_passes_policy_prior_and_reward_model_by_hand():
    frozen = (
        ScoringWork(name="prior", model=small_model(), head="policy"),
        ScoringWork(name="reward", model=small_model(num_layers=2), head="reward"),
    )
    workload = brain(frozen_models=frozen, prompts_per_round=12, global_batch_size=4)
    machine = ideal_machine(bf16_flops=1.0)
    pairs = 21 + 2 * (10 + 24)
    layer, head = 2 * 14 * LINEAR + 4 * pairs * 8, 2 * 8 * 8 * 32
    one_group = 2 * (4 * layer + head) + 2 * layer
    assert scoring_seconds(workload, Layout(num_micro_batches=4), machine) == 12 * one_group


def test_offloaded_weights_come_from_host_memory_once_a_round():
    model = small_model()
    workload = brain(frozen_models=(ScoringWork(name="prior", model=model, head="policy", offloaded=True),))
    machine = ideal_machine(host_bandwidth=1.0)
    assert scoring_seconds(workload, Layout(tensor=2), machine) == 2 * pipeline_stage_parameters(
        model, Layout(tensor=2), 0
    )


def test_a_step_has_its_share_of_the_round():
    workload = brain(prompts_per_round=12, global_batch_size=4, steps_per_round=3)
    layout, machine = Layout(num_micro_batches=4), MACHINES["h100"]
    step = step_time(workload, layout, machine)
    assert step.sampling == pytest.approx(sampling_seconds(workload, layout, machine) / 3)
    assert step.scoring == pytest.approx(scoring_seconds(workload, layout, machine) / 3)
    rest = dataclasses.replace(step, sampling=0.0, scoring=0.0)
    assert rest == training_time(workload, layout, machine)
    given = step_time(dataclasses.replace(workload, samples_responses=False), layout, machine)
    assert (given.sampling, given.scoring) == (0.0, 0.0)


def test_candidates_are_drawn_and_given_rewards_before_a_part_of_them_is_trained_on():
    model, layout, machine = small_model(), Layout(), MACHINES["h100"]
    prior, reward = (ScoringWork(name=n, model=model, head=h) for n, h in (("prior", "policy"), ("reward", "reward")))
    drawn = brain(frozen_models=(prior, reward))
    n = drawn.samples_per_prompt
    chosen = dataclasses.replace(drawn, candidates_per_prompt=3 * n)
    as_many = dataclasses.replace(drawn, samples_per_prompt=3 * n)
    assert sampling_seconds(chosen, layout, machine) == sampling_seconds(as_many, layout, machine)
    alone = [
        scoring_seconds(dataclasses.replace(drawn, frozen_models=models), layout, machine) for models in ((), (reward,))
    ]
    # Nobody scores log q' of what was chosen; the reward model scores three times as many.
    expected = scoring_seconds(drawn, layout, machine) - alone[0] + 2 * (alone[1] - alone[0])
    assert scoring_seconds(chosen, layout, machine) == pytest.approx(expected)
